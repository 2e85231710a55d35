"""Fit Chebyshev polynomials to all computed features so far, and read off the next ones.

Citation:
    "Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration" (Spectrum), arXiv 2603.01623, CVPR 2026;
    constants of the released code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.polynomial.chebyshev import chebvander

from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.newton import extrapolation_weights
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

ALPHAS = (0.75, 3.0)  # growth of the window, at about 3.5 and 5 times the speed
BUFFER = 100  # computed features that the fit looks at


@dataclass(frozen=True)
class Spectrum(TableMethod):
    """Degree ``degree``, 5 warm-up steps in its own schedule, a slot for every computed step (up to 100), hidden cut.

    Ridge regression with ``ridge`` on Chebyshev polynomials in tau = 2 s / T - 1 over the whole run; ``blend`` is the share
    of it, the rest is linear extrapolation of the last two computed features. The ridge pulls towards zero and not towards
    the last feature: not even constants are reproduced (weights sum to 0.65 to 0.96 at 50 steps), so amplitude is lost.
    """

    name: ClassVar[str] = "spectrum"
    summary: ClassVar[str] = "fit Chebyshev polynomials to all features so far (Spectrum)"
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = 5
    degree: int = 4
    ridge: float = 0.1
    blend: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.degree <= 16:
            raise InputError(f"degree is {self.degree}; spectrum takes 0 to 16")
        if not self.ridge > 0:
            raise InputError(f"ridge is {self.ridge}; spectrum takes more than 0")
        if not 0 <= self.blend <= 1:
            raise InputError(f"blend is {self.blend}; spectrum takes 0 (linear) to 1 (Chebyshev)")

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The published window schedule with as many computed steps as the counter rule has at ``interval``.

        At 50 steps, 4 and 6 give the two published lists.
        """
        return spectrum_schedule(num_steps, budget=len(interval_schedule(num_steps, interval).compute))

    def published(self, num_steps: int, budget: int) -> Schedule:
        return spectrum_schedule(num_steps, budget)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        computed = np.array(schedule.compute)
        rows = np.zeros((schedule.num_steps, len(computed)))
        for step in schedule.forecast:
            columns = np.flatnonzero(computed < step)
            fitted, last = columns[-BUFFER:], columns[-2:]
            rows[step, fitted] += self.blend * self._fit(computed[fitted], step, schedule.num_steps)
            rows[step, last] += (1 - self.blend) * extrapolation_weights(computed[last], step)
        return ForecastTable.of_rows(schedule, rows)

    def _fit(self, nodes: Array, step: int, num_steps: int) -> Array:
        """Weights [n] on the features of ``nodes`` [n] that give the fit's value at ``step``."""
        basis = chebvander(2 * nodes / num_steps - 1, self.degree)
        target = chebvander(2 * step / num_steps - 1, self.degree).reshape(-1)
        normal = basis.T @ basis + self.ridge * np.eye(self.degree + 1)
        weights: Array = basis @ np.linalg.solve(normal, target)
        return weights


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
    for candidate in (*ALPHAS, low, high):
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
