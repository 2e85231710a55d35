"""What each prompt is for: to fit on, to choose among fits or schedules, or to say how good the chosen one is."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cachec.compiler.calibration.prompts import default_prompts, has_prompts, read_prompts, split_prompts
from cachec.compiler.models.base import check_prompts
from cachec.runtime.errors import InputError

# "stop": tells when to stop training, and which budget is enough; "choose": among schedules, by the pictures of its run
Use = Literal["fit", "stop", "choose", "measure"]
NUM_CALIBRATION = 32  # prompts of the shipped list that a calibration fits on or stops by
NUM_PICTURED = 42  # the same, where others choose schedules
NUM_FIT = 32  # of these, and of a user's own where enough others are left to choose schedules by
NUM_CHOOSE = 96  # of a list of their own, to choose schedules by
MIN_CHOOSE = 64  # of fewer, the worst few captions say little of those of others
NUM_MEASURE = 16  # of the list that nothing is fitted on
NUM_RUN = NUM_CALIBRATION + NUM_MEASURE  # by a calibration that nothing else is said to
STOP_EVERY = 4  # of a shipped list, to fit on and to stop by
MIN_PROMPTS = 8


@dataclass(frozen=True)
class UsedPrompts:
    """Prompts in the order of their runs, and what each is for. Those to choose schedules by come last.

    Nothing is fitted to, nor chosen by, prompts to measure on; so figures that are measured on them are honest.
    """

    prompts: tuple[str, ...]
    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if len(self.uses) != len(self.prompts) or not set(self.uses) <= set(get_args(Use)):
            raise InputError(f"{len(self.prompts)} prompts have uses {sorted(set(self.uses))}: each has one of {get_args(Use)}")
        if "choose" in self.uses[: self.num_whole]:
            raise InputError(
                "prompts to choose schedules by are not the last ones: of the others whole runs are kept, in order"
            )

    @property
    def num_whole(self) -> int:
        """Of how many prompts whole runs are kept, the first ones; of those to choose schedules by only where runs end."""
        return len(self.uses) - self.uses.count("choose")

    def places(self, use: Use) -> list[int]:
        """Where the prompts of one use are."""
        return [place for place, known in enumerate(self.uses) if known == use]

    def check(self, uses: Sequence[Use], origin: str) -> None:
        """Raise ``InputError`` unless there are prompts for all of these uses; ``origin`` is where they come from."""
        if missing := [use for use in uses if not self.places(use)]:
            raise InputError(f"calibration {origin} has no prompts to {' or to '.join(missing)}: make one with more prompts")

    @property
    def facts(self) -> dict[str, str]:
        """What files of them say: how many, which by a hash, and all of it in words."""
        return {
            "num_prompts": str(len(self.prompts)),
            "prompts_sha256": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "prompts": json.dumps(list(self.prompts)),
            "uses": json.dumps(list(self.uses)),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> "UsedPrompts":
        """Those of a file; ``KeyError``, ``ValueError`` or ``TypeError`` if it does not say them."""
        return cls(tuple(json.loads(facts["prompts"])), tuple(json.loads(facts["uses"])))

    @property
    def in_words(self) -> str:
        """How many there are for each use."""
        words: dict[Use, str] = {"fit": "fit on", "stop": "choose by", "measure": "measure on"}
        if self.places("choose"):
            words["choose"] = "choose schedules by"
        return ", ".join(f"{len(self.places(use))} to {text}" for use, text in words.items())

    def first(self, num: int | None) -> "UsedPrompts":
        """The first so many prompts, or all."""
        return UsedPrompts(self.prompts[:num], self.uses[:num])

    def only(self, *uses: Use) -> "UsedPrompts":
        """The prompts of some uses."""
        kept = [place for place, use in enumerate(self.uses) if use in uses]
        return UsedPrompts(tuple(self.prompts[i] for i in kept), tuple(self.uses[i] for i in kept))


def calibration_prompts(
    name: str, given: Sequence[str] | None, num: int = NUM_CALIBRATION, *, choosing: bool = False
) -> UsedPrompts:
    """The prompts of a calibration: ``num`` of the shipped list ``name``, every fourth to stop by, and some to measure on.

    ``choosing``: if the list has some to choose schedules by, these too, and then more to fit on. Prompts of the user's own are
    divided by :func:`split_prompts`; if there are enough to fit on, those beyond the usual number then choose schedules.

    Raises:
        InputError: there are too few.
    """
    if given is not None:
        return _divided(given, choosing=choosing)
    others = default_prompts(name, "choose")[:NUM_CHOOSE] if choosing and has_prompts(name, "choose") else []
    listed = default_prompts(name, "train")[: NUM_PICTURED if others else num]
    uses: list[Use] = ["stop" if place % STOP_EVERY == STOP_EVERY - 1 else "fit" for place in range(len(listed))]
    measured = default_prompts(name, "measure")[:NUM_MEASURE]
    uses += [*_all("measure", measured), *_all("choose", others)]
    return _checked(UsedPrompts((*listed, *measured, *others), tuple(uses)))


def choose_prompts(name: str, file: Path | None, num: int | None) -> UsedPrompts:
    """The first ``num`` prompts of ``file``, or of the shipped list ``name``, for a calibration.

    ``None`` is the usual number, or all of a shorter file.

    Raises:
        InputError: there are too few, or ``file`` cannot be read.
    """
    listed = default_prompts(name, "train") if file is None else read_prompts(file)
    num = min(NUM_CALIBRATION, len(listed)) if num is None else num
    if num < MIN_PROMPTS:
        raise InputError(f"num is {num}; calibration needs at least {MIN_PROMPTS} prompts, to fit on and to choose by")
    if num > len(listed):
        raise InputError(
            f"num is {num}, but there are only {len(listed)} prompts: give more with --prompts, or --num {len(listed)}"
        )
    return calibration_prompts(name, None if file is None else listed[:num], num)


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


def _divided(given: Sequence[str], *, choosing: bool = False) -> UsedPrompts:
    """``choosing``: so many of those to fit on do so that enough others are left to choose schedules by."""
    split = split_prompts(given)
    num = NUM_FIT if choosing and len(split.fit) >= NUM_FIT + MIN_CHOOSE else len(split.fit)
    parts: dict[Use, Sequence[str]] = {
        "fit": split.fit[:num],
        "stop": split.stop,
        "measure": split.measure,
        "choose": split.fit[num : num + NUM_CHOOSE],
    }
    prompts = [prompt for part in parts.values() for prompt in part]
    return _checked(UsedPrompts(tuple(prompts), tuple(use for use, part in parts.items() for _ in part)))


def _all(use: Use, prompts: Sequence[str]) -> tuple[Use, ...]:
    return (use,) * len(prompts)


def _checked(prompts: UsedPrompts) -> UsedPrompts:
    needed: tuple[Use, ...] = ("fit", "stop", "measure")
    counts = {use: len(prompts.places(use)) for use in needed}
    if len(prompts.prompts) < MIN_PROMPTS or not all(counts.values()):
        raise InputError(
            f"{len(prompts.prompts)} prompts are too few: {counts['fit']} to fit on, {counts['stop']} to choose by, "
            f"{counts['measure']} to measure on (by a hash of their text). Give at least {MIN_PROMPTS}, and some of each"
        )
    return prompts
