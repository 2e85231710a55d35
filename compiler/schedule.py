"""Schedules: which of the T steps compute the whole model. Pure data."""

import math
from dataclasses import dataclass
from itertools import pairwise

from cachec.compiler.published import L2P_LISTS, L2P_STEPS, SPECTRUM_ALPHAS
from cachec.runtime.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """``compute`` lists the computed steps of ``num_steps``; all others are forecast."""

    num_steps: int
    compute: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"steps is {self.num_steps}; it must be at least 1")
        if not self.compute or self.compute[0] != 0:
            raise InputError(f"schedule {list(self.compute)} must start at step 0: the first step has nothing to forecast from")
        if any(later <= earlier for earlier, later in pairwise(self.compute)):
            raise InputError(f"schedule {list(self.compute)} must be sorted, each step once")
        if self.compute[-1] >= self.num_steps:
            raise InputError(
                f"schedule computes step {self.compute[-1]}, but {self.num_steps} steps are numbered 0 to {self.num_steps - 1}"
            )

    @property
    def forecast(self) -> tuple[int, ...]:
        """The steps that are not computed."""
        computed = set(self.compute)
        return tuple(step for step in range(self.num_steps) if step not in computed)

    def history(self, step: int, window: int, *, feeds_back: bool) -> tuple[int, ...]:
        """Which ``window`` steps a forecast of ``step`` looks at, newest first.

        With ``feeds_back`` the history holds every earlier step, computed or forecast; else the computed ones. Where it is
        shorter than the window, its oldest entry is repeated.
        """
        past = range(step - 1, -1, -1) if feeds_back else [s for s in reversed(self.compute) if s < step]
        entries = list(past)[:window]
        return tuple(entries + [entries[-1]] * (window - len(entries)))


def interval_schedule(num_steps: int, interval: int, *, warmup: int = 3, extra: tuple[int, ...] = ()) -> Schedule:
    """The published counter rule (FORA, TaylorSeer; LESA with ``extra=(3,)``).

    A step is computed if it is one of the first ``warmup``, or if ``interval - 1`` forecasts have passed. Steps in
    ``extra`` are computed too and leave the counter alone.
    """
    if interval < 1:
        raise InputError(f"interval is {interval}; it must be at least 1 (1 computes every step)")
    compute, counter = [], 0
    for step in range(num_steps):
        if step < warmup or counter == interval - 1:
            compute.append(step)
            counter = 0
        else:
            counter += 1
            if step in extra:
                compute.append(step)
    return Schedule(num_steps, tuple(compute))


def uniform_schedule(num_steps: int, budget: int) -> Schedule:
    """Steps 0, 1, 2, then evenly spaced ones, ``budget`` in all."""
    if not 1 <= budget <= num_steps:
        raise InputError(f"budget is {budget}; it must lie between 1 and the number of steps, {num_steps}")
    start = list(range(min(3, budget)))
    rest = budget - len(start)
    spaced = [round(2 + (i + 1) * (num_steps - 2) / (rest + 1)) for i in range(rest)]
    return Schedule(num_steps, tuple(start + spaced))


def interval_for_budget(num_steps: int, budget: int, extra: tuple[int, ...] = ()) -> Schedule:
    """The counter rule with the smallest interval that computes at most ``budget`` steps.

    Raises:
        InputError: it computes more at any interval.
    """
    for interval in range(1, num_steps + 1):
        schedule = interval_schedule(num_steps, interval, extra=extra)
        if len(schedule.compute) <= budget:
            return schedule
    raise InputError(f"budget is {budget}; an interval schedule of {num_steps} steps has at least {len(schedule.compute)}")


def l2p_schedule(num_steps: int, budget: int) -> Schedule:
    """The hand-tuned list of L2P (arXiv 2604.26365) with ``budget`` computed steps, for 50 steps.

    Raises:
        InputError: there is none.
    """
    lists = {len(steps): steps for steps in L2P_LISTS.values()}
    if num_steps != L2P_STEPS or budget not in lists:
        known = ", ".join(str(count) for count in sorted(lists))
        raise InputError(
            f"L2P has no list of {budget} steps of {num_steps}; its lists are for {L2P_STEPS} steps, with {known} of them"
        )
    return Schedule(num_steps, lists[budget])


def spectrum_schedule(num_steps: int, budget: int | None = None, alpha: float = 0.75) -> Schedule:
    """Windows that grow (Spectrum, arXiv 2603.01623): 5 warm-up steps, then gaps of 2, 2 + alpha, 2 + 2 alpha, …, rounded down.

    With ``budget``, ``alpha`` is one that gives so many computed steps: a published one (0.75, 3) where it does, else the
    first that bisection finds.

    Raises:
        InputError: ``alpha`` is negative, or no growth gives ``budget`` steps.
    """
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}; windows do not shrink")
    if budget is None:
        return _growing_windows(num_steps, alpha)
    least, most = _growing_windows(num_steps, num_steps), _growing_windows(num_steps, 0.0)
    low, high = 0.0, float(num_steps)
    for candidate in (*SPECTRUM_ALPHAS, low, high):
        schedule = _growing_windows(num_steps, candidate)
        if len(schedule.compute) == budget:
            return schedule
    for _ in range(64):
        middle = (low + high) / 2
        schedule = _growing_windows(num_steps, middle)
        if len(schedule.compute) == budget:
            return schedule
        low, high = (middle, high) if len(schedule.compute) > budget else (low, middle)
    raise InputError(
        f"budget is {budget}; no growing window over {num_steps} steps has so many: they have {len(least.compute)} to "
        f"{len(most.compute)}"
    )


def _growing_windows(num_steps: int, alpha: float) -> Schedule:
    compute = list(range(min(5, num_steps)))
    window = 2.0
    while compute[-1] + int(window) < num_steps:
        compute.append(compute[-1] + int(window))
        window += alpha
    return Schedule(num_steps, tuple(compute))


def parse_schedule(text: str, num_steps: int) -> Schedule:
    """Read ``0,1,2,9``.

    Raises:
        InputError: it is no list of whole numbers, or no schedule of ``num_steps`` steps.
    """
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"schedule {text!r} is not a list of steps such as 0,1,2,9,16") from error
    return Schedule(num_steps, steps)
