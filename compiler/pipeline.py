"""The story of a compilation, on one page: capture, split, predict, fold, compose, lower, build, write."""

import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from cachec.compiler.capture import capture_predictor, named_model
from cachec.compiler.export import EnginePlan, plan_engines
from cachec.compiler.lower import lower_predictor, lower_table
from cachec.compiler.methods.base import Parameters
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.predictors import check_fit, find_pretrained, load_predictor, predictor_bytes
from cachec.compiler.request import Request
from cachec.compiler.split import cast_transformer, split_model
from cachec.compiler.table import compose
from cachec.compiler.training import train_predictor, training_facts
from cachec.compiler.verify import Verifier, eager_output
from cachec.compiler.write import BundleWriter
from cachec.engines import get_backend
from cachec.passes import COMPUTE, Graphs, dump_to, forecast_passes, run_passes, split_passes
from cachec.passes.base import Observer
from cachec.runtime.bundle import Artifact, Bundle, Manifest, Target
from cachec.runtime.errors import InputError
from cachec.runtime.noise import GENERATOR
from cachec.runtime.program import Program, ProgramKey, hash_sigmas

log = logging.getLogger(__name__)

STAGES = ("capture and split", "predictor", "passes and lowering", "build engines")


@dataclass
class Compilation:
    """What a compilation made besides the bundle, for the closing table. ``seconds`` by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    predictor_origin: str = "none needed"
    trained: bool = False


def compile_bundle(model: LoadedModel, request: Request, out: Path, *, force: bool = False) -> tuple[Bundle, Compilation]:
    """Compile ``model`` into a bundle at ``out``.

    Raises:
        CachecError: of the kind that fits; ``out`` is then as it was.
    """
    backend = get_backend(request.backend)
    result = Compilation()
    with BundleWriter(out, force=force) as writer, _Clock(result.seconds, STAGES) as clock:
        split = split_model(model, request.settings, _observers(model, request))
        clock.lap()
        work = out.with_name(out.name + ".training")
        parameters = find_parameters(model, request, result, work)
        clock.lap()
        forecast = add_forecast(model, split, request, parameters)
        program = lower(model, forecast, request)
        plans = plan_engines(forecast, model.example_inputs(request.settings), request.settings.steps)
        clock.lap()
        target = build_target(backend, request, plans, writer)
        clock.lap()
        programs = {"default": writer.add_program("default", program)}
        if parameters is not None:
            writer.add_bytes("predictor/predictor.safetensors", predictor_bytes(parameters))
        writer.commit(_manifest(model, request, target, programs, writer, parameters))
    if result.trained:
        shutil.rmtree(work)
    return Bundle.open(out), result


def find_parameters(model: LoadedModel, request: Request, result: Compilation, work: Path) -> Parameters | None:
    """The method's trained parameters: from the given file, from the package, or trained now (resumable in ``work``)."""
    if not request.method.needs_training:
        return None
    if not request.schedule.forecast:
        raise InputError(
            f"all {request.settings.steps} steps are computed: there is nothing for {request.method.name} to forecast"
        )
    wanted = training_facts(model, request.method, request.schedule, request.settings)
    if request.predictor is not None:
        parameters = load_predictor(request.predictor)
        check_fit(parameters, wanted)
        result.predictor_origin = f"from {request.predictor}"
    elif not request.retrain and (shipped := find_pretrained(type(request.method), wanted)) is not None:
        parameters = shipped
        result.predictor_origin = f"ships with cachec ({Path(shipped.origin).name})"
    else:
        log.warning("no trained %s predictor fits these settings: training one now", request.method.name)
        parameters = train_predictor(model, request, work=work)
        result.predictor_origin, result.trained = "trained now", True
    log.info("predictor: %s", result.predictor_origin)
    return parameters


def add_forecast(model: LoadedModel, split: Graphs, request: Request, parameters: Parameters | None) -> Graphs:
    """Inline the method's predictor into the forecast graph and, unless told otherwise, fold it to numbers."""
    method, schedule = request.method, request.schedule
    inputs = model.example_inputs(request.settings)
    with torch.no_grad():
        example = split.modules[COMPUTE](**inputs)["feature"]
    predictor = capture_predictor(method.predictor(parameters), method.window, example, request.settings.steps)
    sigmas = torch.from_numpy(model.sampling(request.settings)[0])
    histories = method.histories(schedule)
    passes = forecast_passes(predictor, sigmas, histories, fold=request.fold)
    return run_passes(split, passes, observers=_observers(model, request, start=len(split_passes(model.block))))


def lower(model: LoadedModel, graphs: Graphs, request: Request) -> Program:
    """The program of the request: composed coefficients, or predictor calls if nothing was folded."""
    settings, method, schedule = request.settings, request.method, request.schedule
    sigmas, timesteps = model.sampling(settings)
    key = ProgramKey(
        settings.steps, hash_sigmas(sigmas), settings.height, settings.width, settings.text_tokens, batch=request.batch
    )
    if graphs.rows is None:
        return lower_predictor(
            schedule, method.window, feeds_back=method.feeds_back, key=key, sigmas=sigmas, timesteps=timesteps
        )
    rows, bias = graphs.rows.coefficients.numpy(), graphs.rows.bias.numpy()
    table = compose(rows, bias, schedule, feeds_back=method.feeds_back)
    return lower_table(table, key, sigmas, timesteps)


def build_target(backend: Any, request: Request, plans: Sequence[EnginePlan], writer: BundleWriter) -> Target:
    """Build the engines into the bundle."""
    settings = request.settings
    directory = writer.directory(f"engines/{backend.name}-cpu-{settings.dtype}-{settings.height}x{settings.width}")
    signatures = {plan.name: plan.signature for plan in plans}
    paths = backend.build({plan.name: plan.program for plan in plans}, signatures, directory)
    engines = {name: Artifact(writer.seal(path), signatures[name]) for name, path in paths.items()}
    for extra in sorted(directory.iterdir()):
        if extra.relative_to(writer.staging).as_posix() not in writer.files:
            writer.seal(extra)
    return Target(
        backend=backend.name,
        version=backend.version(),
        os=platform.system().lower(),
        precision=settings.dtype,
        shape_bucket=f"{settings.height}x{settings.width}, {settings.text_tokens} text tokens",
        engines=engines,
    )


def _observers(model: LoadedModel, request: Request, start: int = 0) -> list[Observer]:
    observers: list[Observer] = [_log_pass]
    if request.dump_graphs is not None:
        observers.append(dump_to(request.dump_graphs, start=start))
    if request.verify_passes:
        inputs = model.example_inputs(request.settings)
        reference = eager_output(
            named_model(cast_transformer(model, request.settings), model.constants(request.settings)), inputs
        )
        sigmas = torch.from_numpy(model.sampling(request.settings)[0])
        observers.append(Verifier(reference, inputs, sigmas, request.method.histories(request.schedule)))
    return observers


def _log_pass(index: int, one: Any, result: Any) -> None:
    sizes = ", ".join(f"{name} {len(module.graph.nodes)}" for name, module in result.graphs.modules.items())
    log.info("pass %s: %s (nodes: %s)", one.name, "changed" if result.changed else "nothing to do", sizes)


def _manifest(
    model: LoadedModel,
    request: Request,
    target: Target,
    programs: Mapping[str, Mapping[str, str]],
    writer: BundleWriter,
    parameters: Parameters | None,
) -> Manifest:
    settings, method = request.settings, request.method
    io = model.io
    return Manifest(
        model={"name": model.spec.name, "source": model.spec.portable_source, "weights_sha256": model.weights_hash},
        io={"latents": io.latents, "timestep": io.timestep, "conditions": list(io.conditions)},
        method={
            "name": method.name,
            "options": method.options(),
            "feeds_back": method.feeds_back,
            "short_history": "repeat the oldest entry",
            "fold": "static" if request.fold else "none",
            "predictor": dict(parameters.facts) if parameters else None,
        },
        settings={
            **vars(settings),
            "interval": request.interval,
            "seed": request.seed,
            "cut": model.block,
            "prompts": model.spec.prompts,
        },
        noise=GENERATOR,
        targets=(target,),
        programs=programs,
        files=writer.files,
        facts={"made_by": f"cachec {importlib.metadata.version('cachec')}", "torch": torch.__version__},
    )


class _Clock:
    """Seconds by stage, with a progress bar over the stages on a terminal; a context manager."""

    def __init__(self, seconds: dict[str, float], stages: Sequence[str]) -> None:
        self._seconds, self._stages = seconds, list(stages)
        self._bar = tqdm(total=len(stages), unit="stage", desc=self._stages[0], disable=None, leave=False)
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def lap(self) -> None:
        """The current stage is done."""
        now = time.perf_counter()
        stage = self._stages[len(self._seconds)]
        self._seconds[stage] = now - self._last
        self._last = now
        log.info("%s: %.1f s", stage, self._seconds[stage])
        self._bar.update()
        if len(self._seconds) < len(self._stages):
            self._bar.set_description(self._stages[len(self._seconds)])
