"""From engine plans to engine files in a bundle, and loaded engines."""

import importlib.metadata
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from cachec.compiler.graphs.coding import Coding
from cachec.compiler.graphs.export import EnginePlan, plan_engines
from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.engines import get_builder
from cachec.engines.backends import FROM_ONNX
from cachec.engines.build_target import build_into, load_collected
from cachec.engines.fastest import keep_fastest
from cachec.engines.onnx_files import build_onnx
from cachec.engines.targets import ONNX_TARGET, TargetName, find_fit
from cachec.engines.weights_file import Unfinished
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import ENGINES, EngineBuilder, Sources
from cachec.runtime.bundle import Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine, LoadOptions
from cachec.runtime.files import temporary_folder
from cachec.runtime.variants import label_of_shapes
from cachec.runtime.version import VERSION
from cachec.runtime.work import claim_work
from cachec.runtime.write import Collector

log = logging.getLogger(__name__)


class _Planned(Sources):
    """Engine plans, whose ONNX files are written when they are first asked for."""

    def __init__(self, plans: Sequence[EnginePlan], precision: str, shape_bucket: str) -> None:
        self._plans = plans
        self._files: dict[str, Path] | None = None
        self.signatures = {plan.name: plan.signature for plan in plans}
        self.precision, self.shape_bucket = precision, shape_bucket

    @property
    def wrote_onnx(self) -> bool:
        """Was anything built from the ONNX files?"""
        return self._files is not None

    def programs(self) -> Mapping[str, ExportedProgram]:
        values = Values()
        return {plan.name: values.program(plan.program) for plan in self._plans}

    def onnx(self) -> Mapping[str, Path]:
        if self._files is None:
            self._files = self._place_onnx()
        return self._files

    @abstractmethod
    def _place_onnx(self) -> dict[str, Path]:
        """Write the files where they belong; returns them by name."""


class PlannedSources(_Planned):
    """The graphs of one size in a compilation. ONNX files go into the bundle, beside those of other sizes (``onnx``)."""

    def __init__(self, plans: Sequence[EnginePlan], onnx: "BundleOnnx", precision: str, shape_bucket: str) -> None:
        super().__init__(plans, precision, shape_bucket)
        self._onnx, self.folder = onnx, onnx.folder

    def _place_onnx(self) -> dict[str, Path]:
        return self._onnx.of(self.shape_bucket)


class BundleOnnx:
    """The ONNX files of all sizes of a bundle, over one weights file; all are written when one is first asked for.

    ``plans`` by shape bucket. ``unfinished``: where the weights are until all are written, on the bundle's disk, for an
    interrupted compilation to go on. It is asked for when they are written. ``folder``: where in the bundle they are.
    """

    def __init__(
        self,
        plans: Mapping[str, Sequence[EnginePlan]],
        writer: Collector,
        precision: str,
        unfinished: Callable[[], Unfinished] | None = None,
        folder: str = ENGINES,
    ) -> None:
        self._plans, self._writer, self._precision, self._unfinished = plans, writer, precision, unfinished
        self.folder = folder
        self._files: dict[str, dict[str, Path]] | None = None

    def of(self, shape_bucket: str) -> dict[str, Path]:
        """The files of a size, by graph."""
        if self._files is None:
            self._files = self._write()
        return self._files[shape_bucket]

    def _write(self) -> dict[str, dict[str, Path]]:
        places = {(bucket, plan.name): plan for bucket, plans in self._plans.items() for plan in plans}
        names = {place: f"{place[1]}-{label_of_shapes(place[0])}" for place in places}
        programs = {names[place]: plan.program for place, plan in places.items()}
        signatures = {names[place]: plan.signature for place, plan in places.items()}
        directory = self._writer.directory(f"{self.folder}/onnx-{self._precision}")
        with ExitStack() as stack:
            unfinished = None if self._unfinished is None else self._unfinished()
            if unfinished is not None:
                stack.enter_context(claim_work(unfinished.folder, "weights file"))
            files = build_onnx(programs, signatures, directory, Values(), unfinished)
        sealed = {name: self._writer.staging / self._writer.seal(path) for name, path in files.graphs.items()}
        self._writer.seal(files.weights, files.weights_sha256)
        return {
            bucket: {plan.name: sealed[names[bucket, plan.name]] for plan in plans} for bucket, plans in self._plans.items()
        }


def planned_sources(
    plans: Mapping[str, Sequence[EnginePlan]],
    writer: Collector,
    precision: str,
    unfinished: Callable[[], Unfinished] | None = None,
    folder: str = ENGINES,
) -> list[PlannedSources]:
    """The graphs of every size in a compilation; arguments as of :class:`BundleOnnx`."""
    onnx = BundleOnnx(plans, writer, precision, unfinished, folder)
    return [PlannedSources(some, onnx, precision, bucket) for bucket, some in plans.items()]


def unfinished_weights(model: LoadedModel, folder: Path) -> Unfinished:
    """The place in ``folder`` for a weights file of ``model``: another one is none that could be gone on with."""
    versions = {"cachec": VERSION, "torch": importlib.metadata.version("torch")}
    return Unfinished(folder, {"weights_sha256": model.weights_hash, **versions})


class LooseSources(_Planned):
    """Graphs of engines that go into no bundle. ONNX files go into ``folder``."""

    def __init__(
        self, plans: Sequence[EnginePlan], folder: Path, precision: str = "float32", shape_bucket: str = "any"
    ) -> None:
        super().__init__(plans, precision, shape_bucket)
        self._folder = folder

    def _place_onnx(self) -> dict[str, Path]:
        programs = {plan.name: plan.program for plan in self._plans}
        return dict(build_onnx(programs, self.signatures, self._folder, Values()).graphs)


def build_targets(
    names: Sequence[TargetName],
    sources: PlannedSources,
    writer: Collector,
    device: DeviceName,
    options: BuildOptions,
    *,
    late: Sequence[TargetName] = (),
) -> tuple[Target, ...]:
    """Build all targets but the ``late`` ones into the bundle; with the ONNX target at the end if others are built from it."""
    targets = [build_into(writer, sources, name, device=device, options=options) for name in names if name not in late]
    if (late or sources.wrote_onnx) and not any(target.backend == ONNX_TARGET.backend for target in targets):
        targets.append(build_into(writer, sources, ONNX_TARGET, device=device, options=options))
    return tuple(targets)


def build_fastest(
    names: Sequence[TargetName],
    sizes: Sequence[PlannedSources],
    writer: Collector,
    device: DeviceName,
    options: BuildOptions,
    failed: Mapping[str, str],
) -> tuple[list[tuple[Target, ...]], dict[str, Any]]:
    """Build the fastest of these back ends, as ``build_targets`` would have built it alone; and what was measured.

    They are timed at the first of the ``sizes``; the targets are by size.

    Raises:
        EngineError: none can be built and run.
    """
    target, facts = keep_fastest(names, sizes[0], writer, device, options, failed)
    name = TargetName(target.backend)
    if target.backend != ONNX_TARGET.backend and target.backend not in FROM_ONNX:
        writer.drop(f"engines/onnx-{sizes[0].precision}")
    with_onnx = [ONNX_TARGET] if target.backend in FROM_ONNX else []
    built = [(target, *(build_into(writer, sizes[0], one, device=device, options=options) for one in with_onnx))]
    for sources in sizes[1:]:
        of_size = (build_into(writer, sources, one, device=device, options=options) for one in (name, *with_onnx))
        built.append(tuple(of_size))
    return built, facts


def warn_unless_any_runs(targets: Sequence[Target]) -> None:
    """Say it if nothing of a bundle runs here, and why."""
    fits = [find_fit(target) for target in targets]
    if not any(fit.fits for fit in fits):
        log.warning("nothing of this bundle runs on this machine: %s", "; ".join(f"{fit.target}: {fit.reason}" for fit in fits))


def load_engines(
    targets: Sequence[Target], sources: Sources, writer: Collector, stack: ExitStack, device: DeviceName
) -> dict[str, Engine]:
    """Engines to measure with, closed with ``stack``: those of the first target that runs on ``device`` here, else eager's."""
    for fit in (find_fit(target, device) for target in targets):
        if fit.backend is not None:
            engines = load_collected(fit, sources, writer)
            break
        log.info("%s does not run on %s here: %s", fit.target, device, fit.reason)
    else:
        log.warning("no target runs on %s here, so levels are measured with PyTorch, op by op", device)
        with temporary_folder() as folder:
            engines = build_and_load(get_builder("eager"), sources, folder, device)
    return {name: stack.enter_context(one) for name, one in engines.items()}


def build_and_load(
    builder: EngineBuilder, sources: Sources, folder: Path, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
) -> Mapping[str, Engine]:
    """Engines that go into no bundle; their files lie in ``folder``."""
    files = builder.build(sources, folder, device=device, options=options)
    return builder.engine.load(files, sources.signatures, LoadOptions(device))


def linear_engines(
    model: LoadedModel, settings: Settings, backend: str, folder: Path, stack: ExitStack, device: DeviceName = HOST,
    coding: Coding | None = None, *, by_row: bool = False,
) -> dict[str, Engine]:  # fmt: skip
    """Engines that all linear methods of the hidden cut share, or those of one ``coding``, or with weights of each row.

    They are closed with ``stack``; their files are in ``folder``.
    """
    graphs = engine(linear(prepare(model, settings), coding=coding, by_row=by_row), model.io)
    plans = plan_engines(graphs, model.example_inputs(settings), model.io.latents, settings.steps)
    sources = LooseSources(plans, folder, settings.dtype, settings.shape_bucket)
    engines = build_and_load(get_builder(backend), sources, folder, device)
    return {name: stack.enter_context(one) for name, one in engines.items()}
