"""Noise levels that a request brings, where no program has them: every step is computed, as by the pipeline called with them.

How a scheduler makes noise levels of the ``sigmas`` that a pipeline's call takes was found when the bundle was compiled
(``compiler/handed.py``). Steps of flows follow from their noise levels; those of other samplers are not made here.

Shapes: ``T`` steps.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.runtime.abi import COMPUTE, steps_of
from cachec.runtime.errors import InputError, shortened
from cachec.runtime.instructions import Advance, Compute, Instruction
from cachec.runtime.program import UNCACHED, Program, hash_sigmas
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.runtime.session import LoadedBundle

log = logging.getLogger(__name__)

SAME = 1e-5  # by which noise levels may differ
FACT = "own_sigmas"  # of what a bundle says of its pipeline


@dataclass(frozen=True)
class Levels:
    """A pipeline's noise levels and times, of what its call takes as ``sigmas``.

    They are ``factor s / (1 + (factor - 1) s)``; with a ``terminal`` one they are stretched from 1, so that the last is this.
    The model is told ``slope`` times the noise level, plus ``offset``. ``steps``: ``None`` if it is so for any number of them.
    """

    factor: float
    terminal: float | None
    slope: float
    offset: float
    steps: int | None

    def of(self, sigmas: Sequence[float] | Array) -> tuple[Array, Array]:
        """Noise levels [T + 1], the last 0, and what the model is told [T]; float32."""
        given = np.asarray(sigmas, np.float64)
        levels = self.factor * given / (1 + (self.factor - 1) * given)
        if self.terminal is not None:
            levels = 1 - (1 - levels) * (1 - self.terminal) / (1 - levels[-1])
        return np.append(levels, 0.0).astype(np.float32), (self.slope * levels + self.offset).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_sigmas(sigmas: Sequence[float], steps: int) -> None:
    """Raise ``InputError`` unless noise levels fall, and there is one for each step; the end of sampling is not among them."""
    text = shortened(",".join(f"{sigma:g}" for sigma in sigmas))
    if len(sigmas) != steps:
        raise InputError(f"sigmas {text} are {len(sigmas)} noise levels for {steps} steps: there must be one for each")
    if not all(map(math.isfinite, sigmas)) or not all(a > b for a, b in pairwise(sigmas)) or sigmas[-1] <= 0:
        raise InputError(f"sigmas {text} must fall and stay above 0, which is where sampling ends")


def with_sigmas(bundle: "LoadedBundle", sigmas: Sequence[float]) -> "LoadedBundle":
    """The bundle at noise levels of the caller's own, as the pipeline's call takes them, one for each step.

    It is the bundle at so many steps, if it was compiled for these levels. Else every level computes every step of them, and
    that is said in the log.

    Raises:
        InputError: they do not fall; or the pipeline or its sampler takes no such levels, or the engines not so many steps.
    """
    sigmas = tuple(map(float, sigmas))
    if not sigmas:
        raise InputError("sigmas are none: give one for each step")
    check_sigmas(sigmas, len(sigmas))
    there = {one.manifest.settings["steps"]: one for one in _step_counts(bundle)}
    facts = [one.manifest.facts.get("handed", {}).get(FACT) for one in (there.get(len(sigmas)), *there.values()) if one]
    known = [Levels(**one) for one in facts if one is not None]
    fitting = next((one for one in known if one.steps in (None, len(sigmas))), None)
    if fitting is None:
        why = f"for {known[0].steps} steps only" if known else "nothing of it"
        raise InputError(
            f"the bundle says {why} what its sampler makes of sigmas, and {len(sigmas)} are given: {_advice(sigmas)}"
        )
    levels, times = fitting.of(sigmas)
    if (same := there.get(len(sigmas))) is not None and np.abs(same.programs[UNCACHED].sigmas - levels).max() < SAME:
        return same
    made = at_levels(bundle, sigmas, levels, times)
    log.warning("no Program of the bundle has these noise levels: every step is computed. To save time, %s", _advice(sigmas))
    return made


def at_levels(bundle: "LoadedBundle", sigmas: Sequence[float], levels: Array, times: Array) -> "LoadedBundle":
    """The bundle with every level computing every step of these noise levels [T + 1], told these times [T]."""
    most = bundle.target.sizes.get(steps_of(COMPUTE), (len(times),))[-1]
    if len(times) > most:
        raise InputError(
            f"sigmas are {len(times)}, and the engines of {bundle.target} are for up to {most} steps: {_advice(sigmas)}"
        )
    whole = bundle.programs[UNCACHED]
    programs = {
        level: _computed(replace(whole, key=replace(whole.key, level=level)), levels, times) for level in bundle.programs
    }
    settings = {**bundle.manifest.settings, "steps": len(times), "sigmas": list(sigmas)}
    return replace(bundle, manifest=replace(bundle.manifest, settings=settings), programs=programs, plain=bundle)


def at_elsewhere(
    own: "LoadedBundle", plain: "LoadedBundle", size: str | None, steps: int | None, text: int | None
) -> "LoadedBundle":
    """``own`` is ``plain`` at levels of the caller's own, and stays so; another number of steps has the bundle's levels."""
    (here,), whole = own.manifest.variants, own.programs[UNCACHED]
    if steps not in (None, here.steps):
        return plain.at(size, steps, text)
    there = plain.at(size, text=text)
    if size not in (None, here.size):
        return with_sigmas(there, here.settings["sigmas"])
    return at_levels(there, here.settings["sigmas"], whole.sigmas, whole.timesteps)


def _advice(sigmas: Sequence[float]) -> str:
    return f"compile with --sigmas {shortened(','.join(f'{one:g}' for one in sigmas)).strip(chr(39))}"


def _step_counts(bundle: "LoadedBundle") -> "list[LoadedBundle]":
    """The bundle at its size with each number of steps, its own first."""
    if bundle.bundle is None:
        return [bundle]
    (own,) = bundle.manifest.variants
    others = [one.steps for one in bundle.bundle.manifest.variants if one.size == own.size and one.steps != own.steps]
    return [bundle, *(bundle.at(steps=steps) for steps in others)]


def _computed(whole: Program, levels: Array, times: Array) -> Program:
    """Every step of a flow, as ``whole`` computes its first."""
    first, steps, moves = [one for one in whole.instructions if one.steps == (0,)], len(times), _moves(whole, levels)
    numbers: dict[str, Any] = {} if whole.gain is None else {"carry": np.ones(steps, np.float32), "gain": moves}
    if whole.moves is not None:
        numbers |= {"moves": moves[:, None], "shares": np.ones(steps, np.float32)}
    return replace(
        whole,
        key=replace(whole.key, steps=steps, sigmas_hash=hash_sigmas(levels)),
        instructions=tuple(_at(one, step) for step in range(steps) for one in first),
        sigmas=levels,
        timesteps=times,
        coefficients=np.zeros((steps, *whole.coefficients.shape[1:]), np.float32),
        bias=np.zeros(steps, np.float32),
        **numbers,
    )


def _moves(whole: Program, levels: Array) -> Array:
    """What the model's output is worth at each step [T]: the step in noise levels, or its negative as families have it.

    Raises:
        InputError: it is something else in the program that computes every step.
    """
    steps = np.diff(whole.sigmas)
    kept, gained = (np.ones(1), steps) if whole.carry is None or whole.gain is None else (whole.carry, whole.gain)
    worth = float(gained[0] / steps[0])
    is_flow = np.allclose(kept, 1, atol=SAME) and np.allclose(gained, worth * steps, atol=SAME)
    looks_back = any(one.from_noise for one in whole.instructions) or whole.target_timesteps is not None
    if looks_back or not is_flow:
        raise InputError("sigmas are given, and steps of this bundle's sampler do not follow from noise levels alone")
    return np.asarray(worth * np.diff(levels), np.float32)


def _at(one: Instruction, step: int) -> Instruction:
    """An instruction of another step."""
    if isinstance(one, Advance):
        return replace(one, span=(step,))
    assert isinstance(one, Compute), "what else a program has that computes every step"
    return replace(one, step=step)
