"""Every method at equal cost: rows of ``bench.quality``, all through the planner that ``cachec compile`` has."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.quality_setting import Rows, Setting
from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.calibration.uses import training_prompts
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import CodedMethod, Method
from cachec.compiler.methods.parameters import Parameters, load_predictor, predictor_bytes
from cachec.compiler.methods.training import Training, find_shipped, train_predictor, training_facts
from cachec.compiler.planning.goals import Goal
from cachec.compiler.planning.planner import Calibrations, Planner
from cachec.compiler.planning.search import (
    CLOSED_MOVES,
    FEW_SCHEDULES,
    few_prompts,
    polish_schedule,
    search_schedules,
    solver_score,
)
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.samplers import SOLVERS, solver_rows
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.errors import InputError
from cachec.runtime.files import write_file
from cachec.runtime.program import Program

EQUAL = "equal cost"  # the part that these rows are
SOLVER_STARTS = 8  # of searches for plain solvers, whose rows take a millisecond a schedule
WHOLE_BUDGET = 8  # the budget with all rows; the others have those that may win somewhere
BUDGETS = (8, 10, 6)

LINCA_UPDATES = 200  # of each of its networks, for the time that the usual 2,000 take
METHODS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "reuse": ("reuse", {}),
    "taylor:1": ("taylor", {"order": "1"}),
    "taylor:2": ("taylor", {"order": "2"}),
    "newton:2": ("newton", {"order": "2"}),
    "hicache": ("hicache", {}),
    "foca": ("foca", {}),
    "spectrum": ("spectrum", {}),
    "adams:2": ("adams", {"order": "2"}),
    "l2p (Adam)": ("l2p", {"fit": "adam"}),
    "l2p (closed)": ("l2p", {"fit": "closed"}),
    "freqca": ("freqca", {"transform": "fft"}),
    "svd-cache": ("svd-cache", {}),
    "hyca": ("hyca", {}),
    "linca": ("linca", {"updates": str(LINCA_UPDATES)}),
    "dyweight": ("dyweight", {}),
    "bns": ("bns", {}),
    "gram, closed form": ("gram", {"polish": "0", "choose": "latents"}),
    "gram": ("gram", {"choose": "latents"}),
    "gram, by pictures": ("gram", {"choose": "pictures"}),
    "gram, free times": ("gram", {"times": "free"}),
    "gram-hidden": ("gram-hidden", {}),
    "lesa": ("lesa", {}),
}
BRIEF: Mapping[str, Mapping[str, str]] = {  # trainings that only show that they run
    "dyweight": {"updates": "2"}, "bns": {"updates": "2"}, "linca": {"updates": "2"}, "lesa": {"max_rounds": "1"},
}  # fmt: skip
OURS = ("gram", "gram, closed form", "gram, by pictures", "gram, free times", "gram-hidden")
OWN = ("taylor:1", "taylor:2", "reuse", "newton:2", "hicache", "foca", "spectrum", "adams:2", "freqca", "svd-cache", "hyca",
       "linca", "l2p (Adam)")  # fmt: skip
QUICK = 2  # of these and of the solvers, which come first
UNIFORM = ("taylor:1", "taylor:2")
SEARCHED = ("taylor:1", "newton:2", "taylor:2", "hicache", "reuse")
ON_OURS = ("dyweight", "hyca")  # what has no search of its own, on gram's steps
LESS_OWN = ("taylor:1", "taylor:2", "reuse", "hicache", "freqca", "svd-cache", "hyca", "linca")
LESS_SEARCHED = ("taylor:1", "newton:2", "taylor:2")
SEARCHED_SOLVERS = ("ab2", "unipc", "dpm")
WHOLE_ON_OURS = ("freqca", "svd-cache", "linca", "l2p (closed)", "bns")  # at one budget only


def bench_equal_cost(rows: Rows, setting: Setting, budget: int) -> None:
    """All rows of one budget, those that are compared most first."""
    whole = budget == WHOLE_BUDGET

    def measure(name: str, steps: str, make: Callable[[], Program]) -> None:
        rows.measure(EQUAL, budget, name, steps, lambda: setting.measure(make()))

    def on(name: str, steps: str, choose: Callable[[], Schedule]) -> None:
        rows.measure(EQUAL, budget, name, steps, lambda: measure_on(setting, make_method(setting, name), choose(), name))

    def searched(name: str, steps: str = "searched") -> None:
        measure(name, steps, lambda: plan(setting, make_method(setting, name), Goal(budget=budget)))

    def solver(name: str) -> None:
        measure(name, "uniform", lambda: solver_program(setting, name, budget))

    for name in SOLVERS[:QUICK]:
        solver(name)
    searched("gram, closed form")
    own = OWN if whole else LESS_OWN
    for name in own[:QUICK]:
        on(name, "own", lambda n=name: own_schedule(setting, n, budget))
    for name in SEARCHED_SOLVERS:
        measure(name, "searched", lambda n=name: searched_solver(setting, n, budget))
    for name in SEARCHED if whole else LESS_SEARCHED:
        searched(name)
    found = rows.steps(EQUAL, budget, "gram, closed form", "searched")
    ours = None if found is None else Schedule(setting.num_steps, found)
    if ours is not None:
        on("gram", "searched", lambda s=ours: s)
    for name in SOLVERS[QUICK:]:
        solver(name)
    for name in own[QUICK:]:
        on(name, "own", lambda n=name: own_schedule(setting, n, budget))
    for name in UNIFORM:
        on(name, "uniform", lambda: uniform_schedule(setting.num_steps, budget))
    for name in () if ours is None else (*ON_OURS, *WHOLE_ON_OURS) if whole else ON_OURS:
        on(name, "gram's", lambda s=ours: s)
    searched("gram-hidden")
    searched("gram, by pictures", "pictures")
    if (chosen := rows.steps(EQUAL, budget, "gram, by pictures", "pictures")) is not None:
        on("gram, free times", "pictures", lambda: Schedule(setting.num_steps, chosen))


def expected_rows(budget: int) -> list[tuple[str, str]]:
    """Methods and steps that :func:`bench_equal_cost` measures at a budget."""
    whole = budget == WHOLE_BUDGET
    rows = [(name, "uniform") for name in (*SOLVERS, *UNIFORM)]
    rows += [(name, "own") for name in (OWN if whole else LESS_OWN)]
    rows += [(name, "searched") for name in (*SEARCHED_SOLVERS, *(SEARCHED if whole else LESS_SEARCHED))]
    rows += [(name, "searched") for name in ("gram, closed form", "gram", "gram-hidden")]
    rows += [(name, "gram's") for name in (*ON_OURS, *(WHOLE_ON_OURS if whole else ()))]
    return [*rows, ("gram, by pictures", "pictures"), ("gram, free times", "pictures")]


def make_method(setting: Setting, name: str) -> Method:
    """A method of the table above."""
    kind, options = METHODS[name]
    return get_method(kind).with_options({**options, **(BRIEF.get(kind, {}) if setting.extent.brief else {})})


def own_schedule(setting: Setting, name: str, budget: int) -> Schedule:
    """The published schedule with at most ``budget`` computed steps. Raises ``InputError``: there is none."""
    return make_method(setting, name).published(setting.num_steps, budget)


def plan(setting: Setting, method: Method, goal: Goal, parameters: Parameters | None = None) -> Program:
    """What ``cachec compile`` makes of a goal on the setting's calibration."""
    own = setting.calibration.sampling
    planner = Planner(
        method, Calibrations(setting.calibration, None), sampling=setting.sampling, decode=setting.decode,
        key=setting.key(own), parameters=parameters, to_fine=False, forecast_cost=0.0, seed=0,
    )  # fmt: skip
    return planner.plan(goal).program


def measure_on(setting: Setting, method: Method, schedule: Schedule, name: str) -> dict[str, Any]:
    """The row of a method on given steps; what is trained is trained now, if it does not ship and was not before."""
    parameters = trained(setting, method, schedule, name) if method.needs_training else None
    evaluator = None
    if isinstance(method, CodedMethod):
        evaluator = setting.evaluator_with(method, parameters)
    return setting.measure(plan(setting, method, Goal(schedule=schedule), parameters), evaluator)


def find_given(setting: Setting, method: Method, schedule: Schedule) -> Parameters | None:
    """The predictor for a schedule that ships, or one of the files in ``WORK/MODEL/predictors``."""
    wanted = training_facts(setting.model, method, schedule, setting.settings)
    for path in sorted((setting.work / "predictors").glob("*.safetensors")):
        parameters = load_predictor(path)
        if all(parameters.facts.get(name) == value for name, value in wanted.items()):
            return parameters
    return find_shipped(setting.model, method, schedule, setting.settings)


def trained(setting: Setting, method: Method, schedule: Schedule, name: str, *, interval: int | None = None) -> Parameters:
    """A method's predictor: the one that ships, that of an earlier run, or trained now (resumable).

    LinCa's networks are trained on forecasts at all intervals, so one training serves all schedules.
    """
    if (given := find_given(setting, method, schedule)) is not None:
        return given
    of = "" if name == "linca" else f"-{'-'.join(map(str, schedule.compute))}"
    form = "".join(f"-{value}" for value in method.trained_facts(guided=setting.guided).values())
    path = setting.work / "trained" / f"{name}{form}{of}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        prompts = training_prompts(setting.model.spec.prompts, None)
        if setting.extent.brief:
            prompts = prompts.first(setting.extent.fit)
        if isinstance(method, CodedMethod):
            prompts = prompts.first(method.num_prompts)
        training = Training(method, schedule, setting.settings, prompts, 0, interval)
        made = train_predictor(setting.model, setting.evaluator, training, work=path.with_suffix(".parts"))
        write_file(path, predictor_bytes(made))
    return load_predictor(path)


def solver_program(setting: Setting, name: str, budget: int) -> Program:
    """A plain solver at the time steps of the model's sampler with ``budget`` steps."""
    sampling = setting.sampling(budget)
    table = AdvanceTable(Schedule(budget, tuple(range(budget))), solver_rows(name, sampling.sigmas.astype(np.float64)))
    return setting.program(table, sampling)


def searched_solver(setting: Setting, name: str, budget: int) -> Program:
    """A plain solver at the best ``budget`` of the run's own time steps, found as schedules of methods are."""
    fit = setting.fit

    def table(steps: tuple[int, ...]) -> AdvanceTable:
        return AdvanceTable(Schedule(fit.num_steps, steps), solver_rows(name, fit.sigmas[[*steps, -1]]))

    few = few_prompts(fit)

    def closed(steps: tuple[int, ...]) -> float:
        try:
            return -decibels(few.errors(table(steps)))
        except InputError:  # not finite: another schedule may do
            return float("inf")

    score = solver_score(lambda sigmas: solver_rows(name, sigmas), fit)
    candidates = search_schedules(score, fit.num_steps, budget, seed=0, starts=SOLVER_STARTS)
    return setting.program(
        table(polish_schedule(candidates[:FEW_SCHEDULES], closed, fit.num_steps, moves=CLOSED_MOVES, seed=0))
    )
