"""Schedules: which of the T steps compute the whole model. Pure data."""

from dataclasses import dataclass
from itertools import pairwise

from cachec.compiler.tables.published import PUBLISHED
from cachec.runtime.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """``compute`` lists the computed steps of ``num_steps``; all others are forecast.

    ``conditional``: those of them that run the positive branch of guidance only. ``start``: the step that a run begins at; none
    before it is made.
    """

    num_steps: int
    compute: tuple[int, ...]
    conditional: tuple[int, ...] = ()
    start: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"steps is {self.num_steps}; it must be at least 1")
        if not self.compute or self.compute[0] != self.start:
            raise InputError(
                f"schedule {list(self.compute)} must start at step {self.start}: the first step has nothing to forecast from"
            )
        if any(later <= earlier for earlier, later in pairwise(self.compute)):
            raise InputError(f"schedule {list(self.compute)} must be sorted, each step once")
        if self.compute[-1] >= self.num_steps:
            raise InputError(
                f"schedule computes step {self.compute[-1]}, but {self.num_steps} steps are numbered 0 to {self.num_steps - 1}"
            )
        if wrong := sorted({*self.conditional} - {*self.compute[1:]}):
            raise InputError(
                f"schedule runs one branch of guidance at step {wrong[0]}, which "
                + ("has no step before it that ran both" if wrong[0] == 0 else "it does not compute")
            )

    def __str__(self) -> str:
        """As :func:`parse_schedule` reads it."""
        return ",".join(f"{step}{'c' * (step in self.conditional)}" for step in self.compute)

    def check_conditional(self, cut: str, *, guided: bool) -> None:
        """Raise ``InputError`` if there are steps of one branch of guidance where there cannot be."""
        if self.conditional and cut == "hidden":
            raise InputError(
                f"schedule {self} computes one branch of guidance at step {self.conditional[0]}, and the hidden cut both: "
                "take a method of the output cut (gram, bns, adams)"
            )
        if self.conditional and not guided:
            raise InputError(
                f"schedule {self} computes one branch of guidance at step {self.conditional[0]}, but requests have no other: "
                "leave the c out, or compile at a scale of guidance that has two"
            )

    @property
    def work(self) -> float:
        """What is computed, in computed steps; one branch of two is half of one."""
        return len(self.compute) - 0.5 * len(self.conditional)

    @property
    def forecast(self) -> tuple[int, ...]:
        """The steps that are not computed."""
        computed = set(self.compute)
        return tuple(step for step in range(self.start, self.num_steps) if step not in computed)

    def after(self, start: int) -> "Schedule":
        """For runs that begin at step ``start``, which is computed whole; what comes behind stays as it is."""
        compute, conditional = (tuple(step for step in steps if step > start) for steps in (self.compute, self.conditional))
        return Schedule(self.num_steps, (start, *compute), conditional, start)

    def history(self, step: int, window: int, *, feeds_back: bool) -> tuple[int, ...]:
        """Which ``window`` steps a forecast of ``step`` looks at, newest first.

        With ``feeds_back`` the history holds every earlier step, computed or forecast; else the computed ones. Where it is
        shorter than the window, its oldest entry is repeated.
        """
        past = range(step - 1, self.start - 1, -1) if feeds_back else [s for s in reversed(self.compute) if s < step]
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


def parse_schedule(text: str, num_steps: int) -> Schedule:
    """Read ``0,1,2,9``, or ``0 1 2 9``; at ``2c`` the positive (conditional) branch of guidance runs alone. Or a published one.

    Raises:
        InputError: it is no list of whole numbers nor a name, or no schedule of ``num_steps`` steps.
    """
    if text in PUBLISHED:
        own, computed = PUBLISHED[text]
        if own != num_steps:
            raise InputError(
                f"schedule {text} was published for {own} steps, and {num_steps} are asked for: give --steps {own}"
            )
        return Schedule(num_steps, computed)
    parts = text.replace(",", " ").split()
    try:
        steps = tuple(int(part.removesuffix("c")) for part in parts or [text])
    except ValueError as error:
        raise InputError(f"schedule {text!r} is not a list of steps such as 0,1,2,9,16") from error
    return Schedule(num_steps, steps, tuple(step for step, part in zip(steps, parts, strict=True) if part.endswith("c")))
