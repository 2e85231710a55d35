"""The front end: from a request to graphs, plans of engines, and Programs. Compiling, accelerating and training share it.

In order: :func:`check` reads and checks all that was given, before anything slow; :func:`find_parameters` trains what is
missing; :func:`make_graphs` and :func:`make_plans` are what engines are built from; :func:`find_calibrations` runs the model
where something is fitted or measured; :func:`make_programs` is the schedules and their numbers. Every function returns a value.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, encode_ahead, recording_here
from cachec.compiler.calibration.statistics import (
    Statistics,
    calibration_facts,
    check_statistics,
    load_statistics,
    record_statistics,
)
from cachec.compiler.calibration.uses import UsedPrompts, calibration_prompts, training_prompts
from cachec.compiler.graphs.costs import memory_facts, samples_at_once
from cachec.compiler.graphs.export import EnginePlan, plan_engines
from cachec.compiler.graphs.finite import check_finite_run
from cachec.compiler.graphs.prepare import compute_only, engine, inlined, linear, prepare, with_blocks
from cachec.compiler.graphs.verify import verifier_for, verify_twin
from cachec.compiler.graphs.weights import is_large
from cachec.compiler.methods.base import BlockMethod, CodedMethod, Method, PredictorMethod
from cachec.compiler.methods.codings import coding_of
from cachec.compiler.methods.parameters import Parameters, check_fit
from cachec.compiler.methods.released import IMPORTED, load_given
from cachec.compiler.methods.training import Training, shipped_for, train_predictor, training_facts
from cachec.compiler.models.base import LoadedModel, ModelSpec, Settings
from cachec.compiler.models.inputs import check_texts
from cachec.compiler.options import GraphWish
from cachec.compiler.planning.levels import forecast_cost
from cachec.compiler.planning.planner import Calibrations, Planner
from cachec.compiler.planning.room import check_evaluation, check_training
from cachec.compiler.request import Request, evaluated_in
from cachec.compiler.tables.lower import NO_TAIL, lower, lower_predictor, lower_uncached, with_starts
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.torch_device import check_device
from cachec.passes import Graphs, dump_to
from cachec.passes.base import Observer
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine
from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.program import UNCACHED, Program, ProgramKey, hash_sigmas

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checked:
    """What a request needs besides the model: each there already, or known how to make.

    ``parameters`` were trained before, or ``training`` says what to train; ``statistics`` were given, or ``prompts`` say what
    to run. All are ``None`` where nothing is needed.
    """

    parameters: Parameters | None = None
    training: Training | None = None
    statistics: Statistics | None = None
    prompts: UsedPrompts | None = None

    @property
    def trains(self) -> bool:
        """Must a predictor be trained?"""
        return self.parameters is None and self.training is not None


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """The graphs of the request's cut, as the passes left them (``plain``), and as engines are built from them."""

    plain: Graphs
    engine: Graphs


@dataclass(frozen=True, eq=False)
class Programs:
    """Programs by level, the uncached one first, and what is known of the levels before they are measured."""

    by_level: Mapping[str, Program]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def check(model: LoadedModel, request: Request) -> Checked:
    """Read and check all that was given. Nothing here captures or runs the model.

    Raises:
        InputError: a size is none of the model's, too few prompts were given, or a calibration is of something else.
        PredictorError: a predictor was trained for something else.
        EngineError: the model is to be run, and its weights have no room on the device.
    """
    checked = _check_given(model, request)
    if checked.trains or request.needs_calibration:
        check_device(request.device)
        check_evaluation(model, evaluated_in(request.settings, request.device), request.device)
    return checked


def _check_cut(model: LoadedModel, settings: Settings) -> None:
    """Raise ``InputError`` unless there is a block to cut behind."""
    if settings.cut is None:
        _ = model.block  # which may not be known
        return
    module = model.capturable(model.transformer if model.stored is None else model.stored.module)
    blocks = [path for path, _ in module.named_modules()]
    if settings.cut not in blocks:
        raise unknown_name("cut", settings.cut, [path for path in blocks if path.rpartition(".")[2].isdecimal()])


def _check_given(model: LoadedModel, request: Request) -> Checked:
    check_texts(model, request.settings)
    model.example_inputs(request.settings)  # which knows the model's sizes
    _check_cut(model, request.settings)
    request.method.check(model, request.settings)
    if request.schedule is not None:
        request.schedule.check_conditional(request.method.cut, guided=model.is_guided(request.settings))
    if request.wish.graph.slots is not None and request.method.cut == "output" and model.is_guided(request.settings):
        raise InputError(
            f"slots is {request.wish.graph.slots}, but the output cut's slots of guided requests are float32: leave it out"
        )
    training = training_of(model.spec, request) if request.method.needs_training else None
    parameters = _read_given(request) if training is None else _find_trained(model, request, training)
    if not request.folds and isinstance(request.method, PredictorMethod):
        request.method.check_inlined(model, request.settings, parameters)
    request.method.check_budgets(parameters, [goal.budget for goal in request.goals if goal.budget is not None])
    if not request.needs_calibration:
        return Checked(parameters, training)
    if (path := request.wish.fit.calibration) is not None:
        return Checked(parameters, training, statistics=_read_statistics(model, request, path))
    prompts = calibration_prompts(model.spec.prompts, request.prompts, choosing="choose" in request.uses)
    return Checked(parameters, training, prompts=prompts.only(*request.uses))


def training_of(spec: ModelSpec, request: Request) -> Training:
    """What to train for a request of one schedule.

    Raises:
        PredictorError: the method has nothing to train.
        InputError: nothing is left to forecast, or there are too few prompts.
    """
    schedule = request.schedule
    assert schedule is not None, "goals of trained methods are schedules"
    prompts = training_prompts(spec.prompts, request.prompts)
    if isinstance(request.method, CodedMethod):
        prompts = prompts.first(request.method.num_prompts)
    training = Training(request.method, schedule, request.settings, prompts, request.wish.fit.seed, request.interval)
    training.check()
    return training


def _find_trained(model: LoadedModel, request: Request, training: Training) -> Parameters | None:
    """Trained parameters: from the given file, or of those that ship; ``None``: they are trained now."""
    wanted = (model, request.method, training.schedule, request.settings)
    if (given := _read_given(request)) is not None:
        if IMPORTED not in given.facts:
            check_fit(given, training_facts(*wanted))
        return given
    return shipped_for(model, training, own_prompts=request.prompts is not None)


def _read_given(request: Request) -> Parameters | None:
    """The given file, trained or imported."""
    path = request.wish.fit.predictor
    return None if path is None else load_given(path, request.method.name, request.settings.steps)


def _read_statistics(model: LoadedModel, request: Request, path: Path) -> Statistics:
    statistics = load_statistics(path)
    precision = evaluated_in(request.settings, request.device)
    check_statistics(
        statistics, calibration_facts(Subject.of(model, request.settings), request.reference_steps or None, precision=precision)
    )
    if request.reference_steps is None and statistics.fine_latents is None:
        raise InputError(
            f"calibration {statistics.origin} has no fine reference, which level fine is fitted to: make one with "
            "cachec calibrate --reference-steps"
        )
    statistics.prompts.check(("fit", "stop", "measure") if request.fits else ("measure",), statistics.origin)
    return statistics


def evaluator_of(
    model: LoadedModel,
    settings: Settings,
    device: DeviceName = HOST,
    *,
    method: Method | None = None,
    parameters: Parameters | None = None,
) -> GraphEvaluator:
    """The model under PyTorch on ``device``: what is trained, fitted and measured against (``request.evaluated_in``).

    With a ``method`` it plays Programs that keep features in its code.

    Raises:
        InputError: PyTorch has no such device here.
        EngineError: it has no room there.
    """
    check_device(device)
    precision = evaluated_in(settings, device)
    check_evaluation(model, precision, device)
    split = prepare(model, replace(settings, dtype=precision))
    room = check_evaluation(model, precision, device, memory_facts(split)["activations"])
    most = samples_at_once(split) if room is None else min(samples_at_once(split), room)
    coding = None if method is None else coding_of(split, settings, method, parameters)
    return GraphEvaluator(split, model.io, device=str(device), precision=precision, max_batch=most, coding=coding)


def training_evaluator(model: LoadedModel, request: Request, training: Training, work: Path) -> GraphEvaluator:
    """What a predictor is trained on, if what is recorded for it has room in ``work``. Raises as ``evaluator_of``."""
    precision = evaluated_in(request.settings, request.device)
    check_device(request.device)
    check_evaluation(model, precision, request.device)
    check_training(model, replace(request.settings, dtype=precision), len(training.prompts.prompts), work)
    encode_ahead(model, training.prompts.prompts, request.settings)
    return evaluator_of(model, request.settings, request.device)


def find_parameters(model: LoadedModel, request: Request, checked: Checked, work: Path | None) -> Parameters | None:
    """The method's trained parameters; they are trained now (resumable in ``work``) if there are none."""
    parameters = checked.parameters
    if parameters is None and checked.training is not None:
        assert work is not None, "trainings keep checkpoints"
        if request.prompts is not None or not model.spec.packaged:  # else it has been said
            log.warning("a predictor of %s is trained now, as none is given", request.method.name)
        evaluator = training_evaluator(model, request, checked.training, work)
        parameters = train_predictor(model, evaluator, checked.training, work=work)
    log.info("predictor: %s", "none needed" if parameters is None else parameters.origin)
    return parameters


def find_calibrations(
    model: LoadedModel, request: Request, checked: Checked, work: Path | None, parameters: Parameters | None = None
) -> Calibrations | None:
    """Calibration runs, if anything needs them: the given ones, or made now (resumable in ``work``).

    Raises:
        InputError: a run gives NaN or infinity.
    """
    subject, statistics = Subject.of(model, request.settings), checked.statistics
    if statistics is None and checked.prompts is None:
        return None
    prompts = checked.prompts if statistics is None else statistics.prompts
    assert prompts is not None
    encode_ahead(model, prompts.prompts, request.settings)
    evaluator = evaluator_of(model, request.settings, request.device, method=request.method, parameters=parameters)
    if statistics is None:
        fine, here = request.reference_steps or 0, recording_here(subject, evaluator)
        statistics = record_statistics(subject, here, prompts, reference_steps=fine, seed=request.wish.fit.seed, work=work)
    return Calibrations.open(statistics, subject, evaluator)


def make_graphs(
    model: LoadedModel, request: Request, parameters: Parameters | None, *, by_row: bool, merge: bool = True
) -> StepGraphs:
    """The graphs of the request's cut. ``by_row``: as :func:`linear`. ``merge``: of linear layers, which copies their weights.

    Raises:
        InputError: the method is of a cut that the model does not have.
        PassError: a graph cannot be rewritten.
        EngineError: an example run of the model is not finite.
    """
    if model.expert is not None and request.method.cut == "hidden":
        raise InputError(NO_TAIL)
    if model.stored is not None and is_large(model.stored.module) and not request.wish.graph.verify_passes:
        verify_twin(model, request.settings)
    watch = observers(model, request)
    split = prepare(model, request.settings, watch, tokens=isinstance(request.method, BlockMethod))
    inputs = model.example_inputs(request.settings)
    check_finite_run(split, inputs, request.settings.dtype, request.wish.graph.slots)
    plain = add_forecast(model, split, request, parameters, watch, by_row=by_row)
    return StepGraphs(plain, _engine(model, request.settings, request.wish.graph, plain, watch, merge=merge))


def plan_graphs(model: LoadedModel, request: Request) -> StepGraphs:
    """What :func:`make_graphs` gives for the forecast of all linear methods: what sizes tell, before a predictor is trained."""
    return usual_graphs(model, request.settings, request.wish.graph, request.method.cut)


def usual_graphs(
    model: LoadedModel, settings: Settings, wish: GraphWish, cut: str, method: Method | None = None, *, by_row: bool = False
) -> StepGraphs:
    """The graphs of a cut that all linear methods share; features in the code of a ``method``, or rows weighed ``by_row``."""
    split = prepare(model, settings)
    coding = None if method is None else coding_of(split, settings, method, None)
    plain = compute_only(split) if cut == "output" else linear(split, coding=coding, by_row=by_row)
    return StepGraphs(plain, _engine(model, settings, wish, plain))


def _engine(
    model: LoadedModel,
    settings: Settings,
    wish: GraphWish,
    plain: Graphs,
    watch: Sequence[Observer] = (),
    *,
    merge: bool = True,
) -> Graphs:
    """The graphs that engines are built from: how the sampler moves latents, and whether velocities are wanted, is theirs."""
    guided = model.is_guided(settings)
    sampling = model.sampling(settings)
    return engine(
        plain,
        model.io if guided else replace(model.io, guidance=None),
        watch,
        hoist=wish.hoist,
        merge=merge,
        velocities=wish.velocities or guided or sampling.euler is None,
        slots=wish.slots,
        carries=sampling.rows is not None,
    )


def make_plans(model: LoadedModel, settings: Settings, graphs: StepGraphs) -> list[EnginePlan]:
    """What engines are built from."""
    inputs = model.example_inputs(settings)
    return plan_engines(graphs.engine, inputs, model.io.latents, settings.steps)


def add_forecast(
    model: LoadedModel, split: Graphs, request: Request, parameters: Parameters | None, watch: Sequence[Observer], *,
    by_row: bool,
) -> Graphs:  # fmt: skip
    """The graphs of the request's cut: the compute graph alone, with the forecast of all linear methods, or a predictor's.

    Raises:
        PredictorError: the predictor is to be folded to numbers, and cannot be.
    """
    method, schedule = request.method, request.schedule
    if method.cut == "output":
        return compute_only(split)
    if isinstance(method, BlockMethod):
        return with_blocks(model, request.settings, method.blocks(model, parameters), watch)
    if schedule is None or not isinstance(method, PredictorMethod):
        return linear(split, watch, coding=coding_of(split, request.settings, method, parameters))
    if request.folds:
        method.table(schedule, model.sampling(request.settings).levels(method.cut), parameters)  # fails now, if at all
        return linear(split, watch, by_row=by_row)
    predictor, steps = method.predictor(parameters), request.settings.steps
    return inlined(split, predictor, window=method.window, num_steps=steps, observers=watch)


def observers(model: LoadedModel, request: Request) -> list[Observer]:
    """What looks on, at all passes of a compilation."""
    folder = request.wish.graph.dump_graphs
    dumps: list[Observer] = [] if folder is None else [dump_to(folder)]
    return [*dumps, verifier_for(model, request.settings)] if request.wish.graph.verify_passes else dumps


def make_programs(
    model: LoadedModel, request: Request, engines: Mapping[str, Engine], calibrations: Calibrations | None,
    parameters: Parameters | None,
) -> Programs:  # fmt: skip
    """A Program for every goal, and the uncached one. ``engines`` are needed only if a speed is asked for.

    Raises:
        QualityError: a goal is out of reach.
    """
    settings, method, schedule = request.settings, request.method, request.schedule
    sampling = model.sampling(settings)
    batch, guided = request.wish.model.batch, model.is_guided(settings)
    key = ProgramKey(settings.steps, hash_sigmas(sampling.sigmas), settings.sizes, batch=batch, guided=guided)
    programs = {UNCACHED: lower_uncached(replace(key, level=UNCACHED), sampling)}
    if schedule is not None and isinstance(method, PredictorMethod | BlockMethod):
        return Programs(programs | {"default": _lower_predictor(model, request, method, parameters, key)})
    cost = forecast_cost(engines, programs[UNCACHED], model.io) if request.wants_speed else 0.0
    planner = Planner(
        method,
        calibrations,
        sampling=lambda steps: model.sampling(settings.with_steps(steps)),
        decode=lambda latents: model.decode(latents, settings),
        key=key,
        parameters=parameters,
        to_fine=request.fits_fine,
        forecast_cost=cost,
        seed=request.wish.fit.seed,
    )
    plans = {goal.level: planner.plan(goal) for goal in request.goals}
    programs |= {level: plan.program for level, plan in plans.items()}
    return Programs(programs, {level: plan.facts() for level, plan in plans.items()})


def _lower_predictor(
    model: LoadedModel, request: Request, method: PredictorMethod | BlockMethod, parameters: Parameters | None, key: ProgramKey
) -> Program:
    """The Program of a predictor on its schedule: composed coefficients, or predictor calls if nothing is folded."""
    sampling = model.sampling(request.settings)

    def make(schedule: Schedule) -> Program:
        if not request.folds:
            return lower_predictor(schedule, method.window, feeds_back=method.feeds_back, key=key, sampling=sampling)
        return lower(method.table(schedule, sampling.levels(method.cut), parameters), key, sampling)

    assert request.schedule is not None, "the caller has looked"
    return with_starts(make, request.schedule, sampling) if method.is_pure else make(request.schedule)
