"""What each prompt is for: to fit on, to choose among fits, or to say how good the chosen one is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cachec.compiler.calibration.prompts import default_prompts, split_prompts
from cachec.compiler.models.base import check_prompts
from cachec.runtime.errors import InputError

Use = Literal["fit", "stop", "measure"]  # "stop": tells when to stop training, and which budget is enough
NUM_CALIBRATION = 32  # prompts of the shipped list that a calibration fits on or chooses by
NUM_MEASURE = 16  # of the list that nothing is fitted on
STOP_EVERY = 4  # of a shipped list, to fit on and to stop by
MIN_PROMPTS = 8


@dataclass(frozen=True)
class UsedPrompts:
    """Prompts in the order of their runs, and what each is for.

    Nothing is fitted to, nor chosen by, prompts to measure on; so figures that are measured on them are honest.
    """

    prompts: tuple[str, ...]
    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if len(self.uses) != len(self.prompts) or not set(self.uses) <= set(get_args(Use)):
            raise InputError(f"{len(self.prompts)} prompts have uses {sorted(set(self.uses))}: each has one of {get_args(Use)}")

    def places(self, use: Use) -> list[int]:
        """Where the prompts of one use are."""
        return [place for place, known in enumerate(self.uses) if known == use]

    def check(self, uses: Sequence[Use], origin: str) -> None:
        """Raise ``InputError`` unless there are prompts for all of these uses; ``origin`` is where they come from."""
        if missing := [use for use in uses if not self.places(use)]:
            raise InputError(f"calibration {origin} has no prompts to {' or to '.join(missing)}: make one with more prompts")

    def only(self, *uses: Use) -> "UsedPrompts":
        """The prompts of some uses."""
        kept = [place for place, use in enumerate(self.uses) if use in uses]
        return UsedPrompts(tuple(self.prompts[i] for i in kept), tuple(self.uses[i] for i in kept))


def calibration_prompts(name: str, given: Sequence[str] | None, num: int = NUM_CALIBRATION) -> UsedPrompts:
    """The prompts of a calibration: ``num`` of the shipped list ``name``, every fourth to choose by, and some to measure on.

    Prompts of the user's own are divided by :func:`split_prompts`.

    Raises:
        InputError: there are too few.
    """
    if given is not None:
        return _divided(given)
    listed = default_prompts(name, "train")[:num]
    uses: list[Use] = ["stop" if place % STOP_EVERY == STOP_EVERY - 1 else "fit" for place in range(len(listed))]
    measured = default_prompts(name, "measure")[:NUM_MEASURE]
    return _checked(UsedPrompts((*listed, *measured), (*uses, *_all("measure", measured))))


def training_prompts(name: str, given: Sequence[str] | None) -> UsedPrompts:
    """The prompts of a training: the whole shipped list ``name``, every fourth to stop by.

    Of the user's own those that :func:`split_prompts` leaves to measure on are left out.

    Raises:
        InputError: there are too few.
    """
    if given is not None:
        return _divided(given).only("fit", "stop")
    listed = default_prompts(name, "train")
    uses: list[Use] = ["fit" if place % STOP_EVERY else "stop" for place in range(len(listed))]
    return UsedPrompts(tuple(listed), tuple(uses))


def _divided(given: Sequence[str]) -> UsedPrompts:
    split = split_prompts(given)
    uses = (*_all("fit", split.fit), *_all("stop", split.stop), *_all("measure", split.measure))
    return _checked(UsedPrompts((*split.fit, *split.stop, *split.measure), uses))


def _all(use: Use, prompts: Sequence[str]) -> tuple[Use, ...]:
    return (use,) * len(prompts)


def _checked(prompts: UsedPrompts) -> UsedPrompts:
    counts = {use: len(prompts.places(use)) for use in get_args(Use)}
    if len(prompts.prompts) < MIN_PROMPTS or not all(counts.values()):
        raise InputError(
            f"{len(prompts.prompts)} prompts are too few: {counts['fit']} to fit on, {counts['stop']} to choose by, "
            f"{counts['measure']} to measure on (by a hash of their text). Give at least {MIN_PROMPTS}, and some of each"
        )
    return prompts
