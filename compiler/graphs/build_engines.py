"""From engine plans to engine files in a bundle, and loaded engines."""

import importlib.metadata
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from cachec.compiler.graphs.export import EnginePlan, plan_engines
from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.engines import get_builder
from cachec.engines.backends import FROM_ONNX
from cachec.engines.build_target import build_into, load_collected
from cachec.engines.fastest import keep_fastest
from cachec.engines.onnx_files import OnnxFiles, build_onnx
from cachec.engines.targets import ONNX_TARGET, TargetName, find_fit
from cachec.engines.weights_file import Unfinished
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.bundle import Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine, LoadOptions
from cachec.runtime.files import temporary_folder
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

    def _write_onnx(self, folder: Path, unfinished: Unfinished | None = None) -> OnnxFiles:
        programs = {plan.name: plan.program for plan in self._plans}
        return build_onnx(programs, self.signatures, folder, Values(), unfinished)


class PlannedSources(_Planned):
    """The graphs of a compilation. ONNX files go into the bundle.

    ``unfinished``: where the weights are until all are written, on the bundle's disk, for an interrupted compilation to go on.
    It is asked for when they are written.
    """

    def __init__(
        self,
        plans: Sequence[EnginePlan],
        writer: Collector,
        precision: str,
        shape_bucket: str,
        unfinished: Callable[[], Unfinished] | None = None,
    ) -> None:
        super().__init__(plans, precision, shape_bucket)
        self._writer, self._unfinished = writer, unfinished

    def _place_onnx(self) -> dict[str, Path]:
        directory = self._writer.directory(f"engines/onnx-{self.precision}")
        with ExitStack() as stack:
            unfinished = None if self._unfinished is None else self._unfinished()
            if unfinished is not None:
                stack.enter_context(claim_work(unfinished.folder, "weights file"))
            files = self._write_onnx(directory, unfinished)
        sealed = {name: self._writer.staging / self._writer.seal(path) for name, path in files.graphs.items()}
        self._writer.seal(files.weights, files.weights_sha256)
        return sealed


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
        return dict(self._write_onnx(self._folder).graphs)


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
    sources: PlannedSources,
    writer: Collector,
    device: DeviceName,
    options: BuildOptions,
    failed: Mapping[str, str],
) -> tuple[tuple[Target, ...], dict[str, Any]]:
    """Build the fastest of these back ends, as ``build_targets`` would have built it alone; and what was measured.

    Raises:
        EngineError: none can be built and run.
    """
    target, facts = keep_fastest(names, sources, writer, device, options, failed)
    if target.backend == ONNX_TARGET.backend:
        return (target,), facts
    if target.backend in FROM_ONNX:
        return (target, build_into(writer, sources, ONNX_TARGET, device=device, options=options)), facts
    writer.drop(f"engines/onnx-{sources.precision}")
    return (target,), facts


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
    model: LoadedModel, settings: Settings, backend: str, folder: Path, stack: ExitStack, device: DeviceName = HOST
) -> dict[str, Engine]:
    """Engines that all linear methods of the hidden cut share, for comparisons; closed with ``stack``, files in ``folder``."""
    graphs = engine(linear(prepare(model, settings)), model.io)
    plans = plan_engines(graphs, model.example_inputs(settings), model.io.latents, settings.steps)
    sources = LooseSources(plans, folder, settings.dtype, settings.shape_bucket)
    engines = build_and_load(get_builder(backend), sources, folder, device)
    return {name: stack.enter_context(one) for name, one in engines.items()}
