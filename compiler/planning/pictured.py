"""Schedules chosen by pictures: of prompts that no row was fitted to, decoded, with a score that sees the worst of them.

Means over latents hide a prompt whose run leaves its path. Such prompts are few, and it is the schedule that loses them: one
that opens with a wide gap. So smooth schedules, dense at both ends, are tried beside the searched one. All are polished for a
round before they are compared: in closed form a schedule whose early nodes are good wins although its last gap leaves an error
that no polish takes away.

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
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.planning.search import Steps
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

POWERS = (0.9, 1.0, 1.1)  # of smooth schedules: the higher, the earlier their steps


def picture_score(psnr: Sequence[float]) -> float:
    """-40 log10 of the mean of 10^(-PSNR / 40) [P], in dB: of the mean root of the error. More is better.

    Between the mean of PSNR, which does not see the worst picture, and the PSNR of the mean error, which sees little else.
    """
    mean = float(np.mean([10 ** (-value / 40) for value in psnr]))
    return math.inf if mean == 0 else -40 * math.log10(mean)


def smooth_schedule(num_steps: int, budget: int, power: float) -> Steps | None:
    """Computed steps T sin^2(pi u / 2), u = (i / K)^g: a smooth curve, dense at both ends. g: ``power``.

    ``None`` if two of them are one, or the last is the end.
    """
    u = (np.arange(budget) / budget) ** power
    places = np.rint(num_steps * np.sin(np.pi * u / 2) ** 2).astype(int).tolist()
    return tuple(places) if len(set(places)) == budget and places[-1] < num_steps else None


def candidates(searched: Steps, num_steps: int) -> list[Steps]:
    """What is tried, each once: ``searched``, and smooth schedules of as many steps."""
    smooth = [smooth_schedule(num_steps, len(searched), power) for power in POWERS]
    return list(dict.fromkeys([searched, *(steps for steps in smooth if steps is not None)]))


@dataclass(frozen=True, eq=False)
class PictureChoice:
    """Scores schedules of a ``method`` on grid steps: rows by ``fit``, pictures of ``choosing``, which are other prompts.

    ``begun``: the brief fits so far, for :meth:`Method.finish`.
    """

    method: Method
    fit: Calibration
    choosing: Calibration
    decode: Decode
    begun: dict[Schedule, Parameters] = field(default_factory=dict)

    @cached_property
    def _wanted(self) -> Array:
        """Pictures [P, …] that the reference ends in."""
        return self._pictures(self.choosing.latents(self.choosing.num_steps))

    def _pictures(self, latents: Array) -> Array:
        return np.concatenate([self.decode(latents[at : at + CHUNK]) for at in range(0, len(latents), CHUNK)])

    def program(self, schedule: Schedule) -> Program:
        """The method's brief fit to a schedule."""
        brief = self.method.brief()
        parameters = self.begun[schedule] = brief.calibrate(self.fit, schedule)
        return self.fit.program(brief.table(schedule, self.fit.sampling.levels(brief.cut), parameters))

    def psnr(self, program: Program) -> list[float]:
        """PSNR in dB [P] of a Program's pictures.

        Raises:
            InputError: its runs are not finite.
        """
        pictures = self._pictures(self.choosing.play(program))
        return [psnr_db(picture, wanted) for picture, wanted in zip(pictures, self._wanted, strict=True)]

    def score(self, steps: Steps) -> float:
        """In dB, more is better; -infinity if no rows fit the schedule, or its runs are not finite."""
        try:
            psnr = self.psnr(self.program(Schedule(self.fit.num_steps, steps)))
        except InputError as error:  # another schedule may do
            log.info("schedule %s: %s", steps, error)
            return -math.inf
        score = picture_score(psnr)
        log.info("schedule %s: %.2f dB, mean %.2f, worst %.2f", steps, score, np.mean(psnr), min(psnr))
        return score

    def choose(self, searched: Steps) -> Steps:
        """The schedule of as many steps as ``searched`` whose pictures score best; ``searched`` if no other is better."""
        scores = {steps: self.score(steps) for steps in candidates(searched, self.fit.num_steps)}
        return max(scores, key=lambda steps: scores[steps])
