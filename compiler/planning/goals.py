"""What a user asks of a level: a schedule, a number of computed steps, a quality, or a speed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachec.compiler.methods import METHODS
from cachec.compiler.methods.base import CodedMethod, Method
from cachec.compiler.options import ScheduleWish
from cachec.compiler.tables.published import PUBLISHED
from cachec.compiler.tables.samplers import SOLVERS
from cachec.compiler.tables.schedule import (
    Schedule,
    interval_schedule,
    parse_schedule,
    uniform_schedule,
)
from cachec.runtime.errors import InputError, QualityError, unknown_name
from cachec.runtime.program import UNCACHED

FINE = "fine"  # fitted to a finer run; other projects mean the same mathematics by the name that it had, "lossless"
OLD_FINE = "lossless"
LEVELS: Mapping[str, float] = {FINE: math.inf, "high": 45.0, "balanced": 40.0, "fast": 35.0}  # PSNR in dB
KINDS = ("uniform", "interval", "search")
DIFFUSERS, PLAIN = "diffusers", "plain"  # rows of an evaluation: the pipeline's own loop, and its sampler with fewer steps
RESERVED = (UNCACHED, DIFFUSERS, PLAIN, *SOLVERS, *METHODS)


@dataclass(frozen=True)
class Goal:
    """One level: exactly one of a fixed ``schedule``, a ``budget`` to search a schedule for, and a target.

    ``psnr``: the smallest budget whose pictures of held-out calibration prompts are as close to the uncached run's, mean in
    dB. ``fine``: the smallest whose pictures are as close to the fine reference's as the uncached run's are.
    ``speedup``: the largest budget whose loop is so many times as fast as the uncached one, by the cost of its calls.
    """

    level: str = "default"
    schedule: Schedule | None = None
    budget: int | None = None
    psnr: float | None = None
    speedup: float | None = None
    fine: bool = False

    @property
    def searched(self) -> bool:
        """Does it take a schedule search, and so calibration runs?"""
        return self.schedule is None

    def __str__(self) -> str:
        if self.schedule is not None:
            return f"{len(self.schedule.compute)} given steps" + ", some of one branch" * bool(self.schedule.conditional)
        if self.budget is not None:
            return f"{self.budget} steps, searched"
        if self.fine:
            return "as close to the fine reference as the uncached run"
        return f"PSNR of {self.psnr:g} dB" if self.psnr is not None else f"{self.speedup:g} times as fast as uncached"


def make_goals(method: Method, steps: int, wish: ScheduleWish) -> tuple[tuple[Goal, ...], int | None]:
    """Goals from options, and the interval if the schedule came from one.

    Raises:
        InputError: options contradict each other, or do not fit the method.
    """
    _check_conflicts(wish)
    if wish.levels is not None:
        goals: tuple[Goal, ...] = parse_levels(wish.levels)
    elif wish.target_psnr is not None:
        goals = (Goal(psnr=_positive("target-psnr", wish.target_psnr, "dB")),)
    elif wish.target_speedup is not None:
        goals = (Goal(speedup=_speedup(wish.target_speedup, steps)),)
    else:
        goal, interval = _one_goal(method, steps, wish)
        return (goal,), interval
    if isinstance(method, CodedMethod) and not method.needs_training:
        raise InputError(
            f"{method.name} forecasts parts of features on their own, so it cannot be searched for levels or targets: "
            "give --interval, --budget or a list of steps"
        )
    if method.needs_training:
        raise InputError(
            f"{method.name} is trained for one schedule, so it cannot be searched for levels or targets: "
            "give --interval, --budget or a list of steps, or take another method"
        )
    return goals, None


def _check_conflicts(wish: ScheduleWish) -> None:
    aims = {"interval": wish.interval, "budget": wish.budget, "levels": wish.levels, "target-psnr": wish.target_psnr,
            "target-speedup": wish.target_speedup}  # fmt: skip
    given = [f"--{name}" for name, value in aims.items() if value is not None]
    if wish.schedule is not None and wish.schedule not in KINDS:
        if wish.schedule not in PUBLISHED and wish.schedule[:1].isalpha():
            raise unknown_name("schedule", wish.schedule, (*KINDS, *PUBLISHED))
        given.insert(0, f"--schedule {wish.schedule}")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} contradict each other: give one")
    if wish.schedule == "uniform" and wish.budget is None:
        raise InputError("--schedule uniform needs --budget: how many steps to compute")
    if wish.schedule == "interval" and (wish.levels or wish.target_psnr or wish.target_speedup):
        raise InputError(f"--schedule interval and {given[0]} contradict each other: levels and targets are searched")
    if wish.schedule == "uniform" and given != ["--budget"]:
        raise InputError(f"--schedule uniform and {given[0]} contradict each other: it takes --budget")
    if wish.schedule == "search" and wish.interval is not None:
        raise InputError("--schedule search and --interval contradict each other: it takes --budget")


def _one_goal(method: Method, steps: int, wish: ScheduleWish) -> tuple[Goal, int | None]:
    kind, budget = wish.schedule, wish.budget
    if kind is not None and kind not in KINDS:
        given = parse_schedule(kind, steps)
        given.check_conditional(method.cut, guided=True)
        if len(given.compute) < method.min_budget:
            raise InputError(f"schedule {kind} is too short: {method.name} needs {method.min_budget} computed steps to start")
        return Goal(schedule=given), None
    if budget is not None and not 1 <= budget <= steps:
        raise InputError(f"budget is {budget}; it must lie between 1 and the number of steps, {steps}")
    if budget is not None and budget < method.min_budget:
        raise InputError(f"budget is {budget}, but {method.name} needs {method.min_budget} computed steps to start")
    if kind == "search" or (kind is None and method.schedule_bound and wish.interval is None):
        if method.needs_training or isinstance(method, CodedMethod):
            why = "is trained for one schedule" if method.needs_training else "forecasts parts of features on their own"
            raise InputError(f"{method.name} {why}; it cannot be searched: give --interval or --budget")
        budget = len(interval_schedule(steps, method.default_interval).compute) if budget is None else budget
        return Goal(budget=budget), None
    if budget is not None:
        return Goal(schedule=method.published(steps, budget) if kind == "interval" else uniform_schedule(steps, budget)), None
    interval = method.default_interval if wish.interval is None else wish.interval
    if wish.interval is not None and wish.interval > steps:
        raise InputError(f"interval is {wish.interval}, but there are {steps} steps: give at most {steps}, or --schedule 0")
    return Goal(schedule=method.interval(steps, interval)), interval


def parse_levels(text: str) -> tuple[Goal, ...]:
    """Read ``fine,high,fast=30``: names of ``LEVELS``, or any name with its own PSNR in dB.

    Raises:
        InputError: a name is unknown, reserved or there twice, or its figure is no number.
    """
    goals: list[Goal] = []
    for part in text.split(","):
        name, equals, figure = part.strip().partition("=")
        check_level_name(name)
        if name in [goal.level for goal in goals]:
            raise InputError(f"level {name!r} is there twice: choose another name")
        if name == OLD_FINE:
            raise InputError(f"level {OLD_FINE} is called {FINE} now: it is fitted to a finer run, and equals none")
        if not equals and name not in LEVELS:
            raise unknown_name("level", name, LEVELS)
        if name == FINE and equals:
            raise InputError("level fine takes no PSNR: it is measured against the fine reference. Give yours another name")
        if name == FINE:
            goals.append(Goal(name, fine=True))
            continue
        goals.append(Goal(name, psnr=_positive(f"level {name}", _number(name, figure) if equals else LEVELS[name], "dB")))
    return tuple(goals)


def check_level_name(name: str) -> None:
    """Raise ``InputError`` unless a level may be called so."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"level {name!r} is not a name: use letters, digits, - and _")
    if name in RESERVED:
        raise InputError(f"level {name!r} is reserved: choose another name")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"level {name} is {text!r}; it must be a PSNR in dB, such as {name}=40") from error


def _positive(name: str, value: float, unit: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value}; it must be a number of {unit} above 0")
    return value


def _speedup(value: float, steps: int) -> float:
    if not (math.isfinite(value) and value >= 1):
        raise InputError(f"target-speedup is {value}; it must be at least 1")
    if value > steps:
        raise InputError(
            f"target-speedup is {value:g}, but the best reachable with {steps} steps is {steps}: one computed step"
        )
    return value


def smallest_budget(psnr: Callable[[int], float], target: float, least: int, most: int) -> int:
    """The smallest budget in ``least`` … ``most`` whose mean ``psnr(budget)`` reaches ``target``: doubling, then bisection.

    Raises:
        QualityError: even ``most`` does not; with the best that was seen.
    """
    low, high, best = least - 1, least, -math.inf  # low fails or is not allowed
    while (reached := psnr(high)) < target:
        low, best = high, max(best, reached)
        if high == most:
            raise QualityError(
                f"no level reaches {target:.2f} dB: the best reachable is {best:.2f} dB. Ask for less, or for more steps"
            )
        high = min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if psnr(middle) >= target else (middle, high)
    return high


def budget_for_speedup(speedup: float, steps: int, forecast_cost: float, *, least: int = 1) -> int:
    """The largest number of computed steps with a loop so many times as fast; a forecast costs that share of a computed step.

    Raises:
        QualityError: not even the ``least`` computed steps are fast enough; with the best reachable.
    """
    if speedup <= 1:
        return steps
    budget = 0 if forecast_cost >= 1 else int((steps / speedup - steps * forecast_cost) / (1 - forecast_cost) + 1e-9)
    if budget < least:
        best = steps / (least + (steps - least) * forecast_cost)
        raise QualityError(
            f"target-speedup is {speedup:g}, but the best reachable is {best:.2f}: computed steps are {least} at least, and a "
            f"forecast costs {100 * forecast_cost:.1f} % of one. An output-cut method such as gram has no forecasts to pay"
        )
    return min(budget, steps)
