"""Schedules chosen by pictures: of prompts that no row was fitted to, decoded, with a score that sees the worst of them.

Means over latents hide a prompt whose run leaves its path; such prompts are few, and it is the schedule that loses them. So the
schedules that the Gram domain finds by several weights, and a family of smooth ones, are fitted in closed form and played.

Shapes: ``P`` prompts, ``K`` computed steps, ``T`` grid steps.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.metrics import Decode, psnr_db
from cachec.compiler.calibration.runs import CHUNK
from cachec.compiler.methods.base import Method
from cachec.compiler.planning.search import GramDomain, Steps, polish_schedule, search_schedules
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

WEIGHTS = ((3.0, 0.0), (3.0, 2.0), (10.0, 2.0), (3.0, 8.0))  # of errors at nodes, and the power of their noise level
BENDS = (0.5, 0.75, 1.0)
POWERS = (0.9, 1.0, 1.1, 1.25)
CLIMBS = 2  # of each Gram optimum: from even steps and from uniform ones
FIRST = 32  # prompts that all candidates are scored on: the most sensitive ones
FINALISTS = 6  # candidates that are scored on all
MOVES = 6  # of the best one
NUDGE = 1e-3  # of the noise, relative


def picture_score(psnr: Sequence[float]) -> float:
    """-40 log10 of the mean of 10^(-PSNR / 40) [P], in dB: of the mean root of the error. More is better.

    Between the mean of PSNR, which does not see the worst picture, and the PSNR of the mean error, which sees little else.
    """
    mean = float(np.mean([10 ** (-value / 40) for value in psnr]))
    return math.inf if mean == 0 else -40 * math.log10(mean)


def shaped_schedule(num_steps: int, budget: int, bend: float, power: float) -> Steps | None:
    """Computed steps T [(1 - w) u + w sin^2(pi u / 2)], u = (i / K)^g: a smooth curve, dense at both ends. w: ``bend``.

    ``None`` if two of them are one.
    """
    u = (np.arange(budget) / budget) ** power
    places = np.rint(num_steps * ((1 - bend) * u + bend * np.sin(np.pi * u / 2) ** 2)).astype(int).tolist()
    return tuple(places) if len(set(places)) == budget and places[-1] < num_steps else None


def gram_optima(calibration: Calibration, budget: int, *, seed: int) -> list[Steps]:
    """Least e_K + beta sum e_i gap_i sigma_i^q over schedules, for each of ``WEIGHTS``: local optima from two starts."""
    domain = GramDomain(calibration.velocity_gram().sum(axis=0), calibration.sampling)
    found = []
    for weight, power in WEIGHTS:

        def score(steps: Steps, weight: float = weight, power: float = power) -> float:
            return domain.total(domain.least_squares(steps), steps, weight=weight, power=power)

        found.append(search_schedules(score, calibration.num_steps, budget, seed=seed, starts=CLIMBS)[0])
    return found


def candidates(calibration: Calibration, searched: Steps, *, seed: int) -> list[Steps]:
    """What is tried, each once: ``searched``, Gram optima, smooth schedules. ``calibration``: the prompts to fit on."""
    budget, num_steps = len(searched), calibration.num_steps
    shaped = [shaped_schedule(num_steps, budget, bend, power) for bend in BENDS for power in POWERS]
    every = [searched, *gram_optima(calibration, budget, seed=seed), *(steps for steps in shaped if steps is not None)]
    return list(dict.fromkeys(every))


@dataclass(frozen=True, eq=False)
class PictureChoice:
    """Scores schedules of a ``method`` on grid steps: rows by ``fit``, pictures of ``choosing``, which are other prompts."""

    method: Method
    fit: Calibration
    choosing: Calibration
    decode: Decode

    @cached_property
    def _wanted(self) -> Array:
        """Pictures [P, …] that the reference ends in."""
        return self._pictures(self.choosing.latents(self.choosing.num_steps))

    def _pictures(self, latents: Array) -> Array:
        return np.concatenate([self.decode(latents[at : at + CHUNK]) for at in range(0, len(latents), CHUNK)])

    def program(self, steps: Steps) -> Program:
        """The method's cheapest fit to a schedule."""
        schedule, draft = Schedule(self.fit.num_steps, steps), self.method.draft()
        parameters = draft.calibrate(self.fit, schedule)
        return self.fit.program(draft.table(schedule, self.fit.sampling.levels(draft.cut), parameters))

    def psnr(self, latents: Array, places: Sequence[int]) -> list[float]:
        """PSNR in dB of final latents [P, …] of some of the prompts to choose by."""
        pictures = self._pictures(latents)
        return [psnr_db(picture, self._wanted[place]) for picture, place in zip(pictures, places, strict=True)]

    def sensitive(self, program: Program, reached: Array) -> list[int]:
        """The prompts to choose by, first those whose runs make most of a small change in the noise; ``reached`` without it."""
        noise = self.choosing.noise()
        nudged = noise + NUDGE * np.random.default_rng(0).standard_normal(noise.shape).astype(noise.dtype)
        change = self.choosing.play(program, nudged) - reached
        grown = np.linalg.norm(change.reshape(len(change), -1), axis=1)
        order: list[int] = np.argsort(-grown, kind="stable").tolist()
        return order

    def choose(self, searched: Steps, *, seed: int) -> Steps:
        """The schedule of as many steps as ``searched`` whose pictures score best.

        All candidates are scored on the most sensitive prompts, the best of them on all, and the best one is moved a little.
        """
        tried = {steps: _Tried(self, self._fitted(steps)) for steps in candidates(self.fit, searched, seed=seed)}
        order = self._order(tried[searched])
        first = {steps: one.score(order[:FIRST]) for steps, one in tried.items()}
        best = sorted(first, key=lambda steps: (-first[steps], steps))[:FINALISTS]

        def closed(steps: Steps) -> float:
            if steps not in tried:
                tried[steps] = _Tried(self, self._fitted(steps))
            return -tried[steps].score(order)

        chosen = polish_schedule(list(dict.fromkeys([*best, searched])), closed, self.fit.num_steps, moves=MOVES, seed=seed)
        reached, before = (tried[steps].score(order) for steps in (chosen, searched))
        log.info("chosen by pictures: %s, %.2f dB; by latents: %s, %.2f dB", chosen, reached, searched, before)
        return chosen

    def _order(self, base: "_Tried") -> list[int]:
        every = list(range(self.choosing.num_prompts))
        if base.program is None:
            return every
        try:
            reached = self.choosing.play(base.program)
            order = self.sensitive(base.program, reached)
        except InputError as error:
            log.info("schedule %s: %s", base.program.compute_steps, error)
            return every
        base.seen.update(zip(every, self.psnr(reached, every), strict=True))
        return order

    def _fitted(self, steps: Steps) -> Program | None:
        try:
            return self.program(steps)
        except InputError as error:  # rows that blow up: another schedule may do
            log.info("schedule %s: %s", steps, error)
            return None


@dataclass(eq=False)
class _Tried:
    """A schedule's Program, ``None`` if no rows fit it, and the PSNR of the prompts to choose by that were played."""

    choice: PictureChoice
    program: Program | None
    seen: dict[int, float] = field(default_factory=dict)

    def score(self, places: Sequence[int]) -> float:
        """By some of the prompts; those that were not played before are now. Runs that are not finite count as the worst."""
        left = [place for place in places if place not in self.seen]
        if left:
            self.seen.update(zip(left, self._psnr(left), strict=True))
        return picture_score([self.seen[place] for place in places])

    def _psnr(self, places: list[int]) -> list[float]:
        if self.program is None:
            return [-math.inf] * len(places)
        try:
            return self.choice.psnr(self.choice.choosing.select(places).play(self.program), places)
        except InputError as error:
            log.info("schedule %s: %s", self.program.compute_steps, error)
            return [-math.inf] * len(places)
