"""The story of a compilation: capture, split, calibrate, inline, fold, build, search, fit, lower, measure, write."""

import importlib.metadata
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.statistics import (
    Statistics,
    calibration_facts,
    check_statistics,
    load_statistics,
    record_statistics,
)
from cachec.compiler.calibration.uses import calibration_prompts, training_prompts
from cachec.compiler.graphs.build_engines import PlannedSources, build_targets, load_engines
from cachec.compiler.graphs.capture import named_model
from cachec.compiler.graphs.costs import hoisting_facts, memory_facts
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.forecast import engine_graphs, inline, linear_graphs
from cachec.compiler.graphs.prepare import model_passes, split_model
from cachec.compiler.graphs.verify import Verifier, eager_output, graph_output
from cachec.compiler.methods.base import PredictorMethod
from cachec.compiler.methods.parameters import Parameters, check_fit, find_pretrained, load_predictor, predictor_bytes
from cachec.compiler.methods.training import Training, train_predictor, training_facts
from cachec.compiler.models.base import LoadedModel, ModelSpec
from cachec.compiler.planning.levels import check_quality, forecast_cost, measure_levels
from cachec.compiler.planning.planner import Calibrations, Planner
from cachec.compiler.request import Request
from cachec.compiler.tables.coefficients import compose
from cachec.compiler.tables.lower import lower_predictor, lower_table, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.build_target import check_build, keep_timing
from cachec.passes import Graphs, dump_to
from cachec.passes.base import Observer
from cachec.runtime.abi import COMPUTE
from cachec.runtime.bundle import Bundle, Manifest, Target
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError, QualityError
from cachec.runtime.noise import GENERATOR
from cachec.runtime.program import UNCACHED, Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array
from cachec.runtime.work import claim_work, remove_work
from cachec.runtime.write import BundleWriter

log = logging.getLogger(__name__)

PASSES_BEFORE_ENGINES = 20  # number of the first dump of engine passes

STAGES = (
    "capture and split",
    "trained predictor",
    "calibration",
    "passes",
    "build engines",
    "schedules and coefficients",
    "measure",
)


@dataclass
class Compilation:
    """What a compilation made besides the bundle, for the closing table. ``seconds`` by stage, ``levels`` as measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    predictor_origin: str = "none needed"
    levels: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    works: list[Path] = field(default_factory=list)


def compile_bundle(model: LoadedModel, request: Request, out: Path, *, force: bool = False) -> tuple[Bundle, Compilation]:
    """Compile ``model`` into a bundle at ``out``.

    Raises:
        CachecError: of the kind that fits; ``out`` is then as it was.
    """
    result = Compilation()
    try:
        bundle = _compile(model, request, out, result, force=force)
    except QualityError:  # another attempt asks for something else, so nothing is kept for it
        _remove(result.works)
        raise
    _remove(result.works)
    return bundle, result


def _remove(works: Sequence[Path]) -> None:
    for work in works:
        remove_work(work)


def _compile(model: LoadedModel, request: Request, out: Path, result: Compilation, *, force: bool) -> Bundle:
    for dtype in {request.settings.dtype, request.slots or request.settings.dtype}:
        check_build(request.targets, dtype, request.device, request.build, max_batch=request.max_batch)
    timing = out.with_name(out.name + ".timing")
    result.works.append(timing)
    with BundleWriter(out, force=force) as writer, _Clock(result.seconds, STAGES) as clock, ExitStack() as stack:
        stack.enter_context(claim_work(timing, "compilation"))
        given = read_calibration(model, request)
        split = split_model(model, request.settings, _observers(model, request))
        clock.lap()
        parameters = find_parameters(model, request, result, out.with_name(out.name + ".training"))
        clock.lap()
        calibrations = find_calibrations(model, split, request, given, result, out.with_name(out.name + ".calibration"))
        clock.lap()
        graphs = add_forecast(model, split, request, parameters)
        observers = _observers(model, request, graphs, start=PASSES_BEFORE_ENGINES)
        final = engine_graphs(model, graphs, request.hoist, observers, velocities=request.velocities, slots=request.slots)
        result.costs = {"hoisted": hoisting_facts(graphs, final), "memory": memory_facts(final)}
        plans = plan_engines(final, model.example_inputs(request.settings), model.io.latents, request.settings.steps)
        clock.lap()
        sources = PlannedSources(plans, writer, request.settings.dtype, request.settings.shape_bucket)
        targets = build_targets(request.targets, sources, writer, request.device, request.options_for(timing))
        measured = request.wants_speed or calibrations is not None
        engines = load_engines(targets, sources, writer, stack, request.device) if measured else {}
        clock.lap()
        programs = make_programs(model, request, graphs, engines, calibrations, parameters, result)
        clock.lap()
        if calibrations is not None:
            measure(model, request, engines, programs, calibrations, result)
        clock.lap()
        files = {level: writer.add_program(level, program) for level, program in programs.items()}
        if parameters is not None:
            writer.add_bytes("predictor/predictor.safetensors", predictor_bytes(parameters))
        kept = keep_timing(writer, timing)
        writer.commit(replace(_manifest(model, request, targets, files, writer, parameters, result), timing=kept))
    return Bundle.open(out)


def read_calibration(model: LoadedModel, request: Request) -> Statistics | None:
    """The given calibration file, if one is.

    Raises:
        InputError: it is of something else, or has too few prompts.
    """
    if request.calibration is None:
        return None
    statistics = load_statistics(request.calibration)
    check_statistics(statistics, calibration_facts(model, request.settings, request.reference_steps or None))
    if request.reference_steps is None and statistics.fine_latents is None:
        raise InputError(
            f"calibration {statistics.origin} has no fine reference, which level fine is fitted to: make one with "
            "cachec calibrate --reference-steps"
        )
    statistics.prompts.check(("fit", "stop", "measure") if request.fits else ("measure",), statistics.origin)
    return statistics


def find_calibrations(
    model: LoadedModel, split: Graphs, request: Request, given: Statistics | None, result: Compilation, work: Path
) -> Calibrations | None:
    """Calibration runs, if anything needs them: the given ones, or made now (resumable in ``work``).

    Raises:
        InputError: there are too few prompts.
    """
    if not request.needs_calibration:
        return None
    settings = replace(request.settings, dtype="float32")
    single = split if request.settings.dtype == "float32" else split_model(model, settings)
    evaluator = GraphEvaluator(single, model.io)
    if given is None:
        prompts = calibration_prompts(model.spec.prompts, request.prompts if request.retrain else None)
        given = record_statistics(
            model,
            evaluator,
            settings,
            prompts if request.fits else prompts.only("measure"),
            reference_steps=request.reference_steps or 0,
            seed=request.seed,
            work=work,
        )
        result.works.append(work)
    result.calibration = {k: v for k, v in given.facts.items() if k not in ("prompts", "uses")}
    return Calibrations.open(given, model, evaluator, settings)


def make_programs(
    model: LoadedModel,
    request: Request,
    graphs: Graphs,
    engines: Mapping[str, Engine],
    calibrations: Calibrations | None,
    parameters: Parameters | None,
    result: Compilation,
) -> dict[str, Program]:
    """A program for every goal, and the uncached one."""
    settings = request.settings
    sigmas, timesteps = model.sampling(settings)
    key = ProgramKey(settings.steps, hash_sigmas(sigmas), settings.sizes, batch=request.batch)
    programs = {UNCACHED: lower_uncached(replace(key, level=UNCACHED), sigmas, timesteps)}
    method, schedule = request.method, request.schedule
    if schedule is not None and isinstance(method, PredictorMethod):
        programs["default"] = lower_folded(graphs, method, schedule, key, sigmas, timesteps)
        return programs
    cost = forecast_cost(engines, programs[UNCACHED], model) if request.wants_speed else 0.0
    planner = Planner(
        model,
        method,
        settings,
        calibrations,
        key=key,
        parameters=parameters,
        to_fine=request.fits_fine,
        forecast_cost=cost,
        seed=request.seed,
    )
    for goal in request.goals:
        plan = planner.plan(goal)
        programs[goal.level] = plan.program
        result.levels[goal.level] = dict(plan.facts())
    return programs


def lower_folded(
    graphs: Graphs, method: PredictorMethod, schedule: Schedule, key: ProgramKey, sigmas: Array, timesteps: Array
) -> Program:
    """The program of a predictor on its one schedule: composed coefficients, or predictor calls if nothing was folded."""
    if graphs.rows is None:
        return lower_predictor(
            schedule, method.window, feeds_back=method.feeds_back, key=key, sigmas=sigmas, timesteps=timesteps
        )
    rows, bias = graphs.rows.coefficients.numpy(), graphs.rows.bias.numpy()
    return lower_table(compose(rows, bias, schedule, feeds_back=method.feeds_back), key, sigmas, timesteps)


def measure(
    model: LoadedModel,
    request: Request,
    engines: Mapping[str, Engine],
    programs: Mapping[str, Program],
    calibrations: Calibrations,
    result: Compilation,
) -> None:
    """Measure every level on held-out prompts, and fail if one is below the gate."""
    evaluator, measured = EngineEvaluator(engines, model.io), calibrations.coarse.of("measure")
    facts = measure_levels(model, request.settings, evaluator, programs, measured)
    by = {"measured_by": f"{engines[COMPUTE].name} on {engines[COMPUTE].device.name}"}
    result.levels = {level: {**result.levels.get(level, {}), **known, **by} for level, known in facts.items()}
    check_quality(result.levels, request.min_psnr)
    for goal in request.goals:
        reached = result.levels[goal.level]["speedup"]
        if goal.speedup is not None and reached < goal.speedup:
            log.warning("level %s: %.2f times as fast was measured, %g was asked for", goal.level, reached, goal.speedup)


def find_parameters(model: LoadedModel, request: Request, result: Compilation, work: Path) -> Parameters | None:
    """The method's trained parameters: from the given file, from the package, or trained now (resumable in ``work``)."""
    if not request.method.needs_training:
        return None
    schedule = request.schedule
    assert schedule is not None, "goals of trained methods are schedules"
    if not schedule.forecast:
        raise InputError(
            f"all {request.settings.steps} steps are computed: there is nothing for {request.method.name} to forecast"
        )
    wanted = training_facts(model, request.method, schedule, request.settings)
    if request.predictor is not None:
        parameters = load_predictor(request.predictor)
        check_fit(parameters, wanted)
        result.predictor_origin = f"from {request.predictor}"
    elif not request.retrain and (shipped := find_pretrained(request.method.name, wanted)) is not None:
        parameters = shipped
        result.predictor_origin = f"ships with cachec ({Path(shipped.origin).name})"
    else:
        log.warning("no trained %s predictor fits these settings: training one now", request.method.name)
        single = split_model(model, replace(request.settings, dtype="float32"))
        parameters = train_predictor(model, GraphEvaluator(single, model.io), training_of(model.spec, request), work=work)
        result.predictor_origin = "trained now"
        result.works.append(work)
    log.info("predictor: %s", result.predictor_origin)
    return parameters


def training_of(spec: ModelSpec, request: Request) -> Training:
    """What to train for a request of one schedule."""
    assert request.schedule is not None, "goals of trained methods are schedules"
    prompts = training_prompts(spec.prompts, request.prompts if request.retrain else None)
    return Training(request.method, request.schedule, request.settings, prompts, request.seed, request.interval)


def add_forecast(model: LoadedModel, split: Graphs, request: Request, parameters: Parameters | None) -> Graphs:
    """The graphs of the request's cut: the compute graph alone, or with the predictor inlined into the forecast graph.

    Unless told otherwise the predictor is folded to numbers. What is left is the same for all linear methods, so methods
    that state their numbers, and searched schedules, take what the simplest predictor leaves.
    """
    if request.method.cut == "output":
        return Graphs({COMPUTE: split.modules[COMPUTE]})
    method, schedule = request.method, request.schedule
    if schedule is None or not isinstance(method, PredictorMethod):
        return linear_graphs(model, split, request.settings)
    return inline(model, split, request.settings, method, schedule, parameters, fold=request.fold,
                  observers=_observers(model, request, split, start=len(model_passes(model, request.settings))))  # fmt: skip


def _observers(model: LoadedModel, request: Request, before: Graphs | None = None, start: int = 0) -> list[Observer]:
    """What looks on. ``before``: the graphs to be compared with, when the model itself was compared with earlier."""
    observers: list[Observer] = [_log_pass]
    if request.dump_graphs is not None:
        observers.append(dump_to(request.dump_graphs, start=start))
    if request.verify_passes:
        inputs = model.example_inputs(request.settings)
        eager = named_model(model.transformer, model.constants(request.settings))
        reference = eager_output(eager, inputs) if before is None else graph_output(before.modules[COMPUTE], inputs)
        sigmas = torch.from_numpy(model.sampling(request.settings)[0])
        method, schedule = request.method, request.schedule
        histories = {} if schedule is None or not isinstance(method, PredictorMethod) else method.histories(schedule)
        dtypes = getattr(torch, request.settings.dtype), next(model.transformer.parameters()).dtype
        observers.append(Verifier(reference, inputs, sigmas, histories, model.io.timestep, model.io.latents, *dtypes))
    return observers


def _log_pass(index: int, one: Any, result: Any) -> None:
    sizes = ", ".join(f"{name} {len(module.graph.nodes)}" for name, module in result.graphs.modules.items())
    log.info("pass %s: %s (nodes: %s)", one.name, "changed" if result.changed else "nothing to do", sizes)


def _manifest(
    model: LoadedModel,
    request: Request,
    targets: tuple[Target, ...],
    programs: Mapping[str, Mapping[str, str]],
    writer: BundleWriter,
    parameters: Parameters | None,
    result: Compilation,
) -> Manifest:
    settings, method = request.settings, request.method
    return Manifest(
        model={"name": model.spec.name, "source": model.spec.portable_source, "weights_sha256": model.weights_hash},
        io=model.io.to_json(),
        method={
            "name": method.name,
            "options": method.options(),
            "cut": method.cut,
            "feeds_back": getattr(method, "feeds_back", False),
            "short_history": "repeat the oldest entry",
            "fold": "static" if request.fold else "none",
            "hoist": request.hoist,
            "slots": request.slots or "their own type",
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
        targets=targets,
        programs=programs,
        files=writer.files,
        facts={
            "made_by": f"cachec {importlib.metadata.version('cachec')}",
            "torch": torch.__version__,
            "levels": result.levels,
            "calibration": result.calibration,
            **result.costs,
        },
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
