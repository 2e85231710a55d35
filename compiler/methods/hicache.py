"""Extrapolate by finite differences over scaled Hermite polynomials.

Citation:
    "HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based Feature Caching",
    arXiv 2508.16984; the formula is that of the re-implementation in hicache-plus-plus, the differences are TaylorSeer's
    (arXiv 2503.06923).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.polynomial import hermite

from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.taylor import WARMUP
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class HiCache(TableMethod):
    """Order ``order``, warm-up 3 steps, ``order + 1`` slots, hidden cut.

    The forecast is sum_i D_i sigma^i H_i(sigma k) / i!, k steps after the last computed feature, with the physicists'
    Hermite polynomials H and TaylorSeer's differences D. Exact on constant features only: the slope comes in with the
    factor 2 sigma^2, one half at the default ``sigma`` 0.5, so it lags behind what moves steadily. That is its damping.
    """

    name: ClassVar[str] = "hicache"
    summary: ClassVar[str] = "extrapolate by finite differences over Hermite polynomials (HiCache)"
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = 3
    order: int = 2
    sigma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 8:
            raise InputError(f"order is {self.order}; hicache takes 0 to 8")
        if not 0 < self.sigma <= 1:
            raise InputError(f"sigma is {self.sigma}; hicache takes more than 0, up to 1")

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        return ForecastTable.of_rows(schedule, hermite_rows(schedule, self.order, self.sigma))


def hermite_rows(schedule: Schedule, order: int, sigma: float, warmup: int = WARMUP) -> Array:
    """Rows [T, K] of the forecast sum_i D_i sigma^i H_i(sigma k) / i!, up to ``order``; at order 0 of plain reuse."""
    differences = taylor_differences(schedule, order, warmup)
    rows = np.zeros((schedule.num_steps, len(schedule.compute)))
    for step in schedule.forecast:
        newest = max(i for i, computed in enumerate(schedule.compute) if computed < step)
        distance = step - schedule.compute[newest]
        for i, difference in enumerate(differences[newest]):
            value = float(hermite.hermval(sigma * distance, [0.0] * i + [1.0]))
            rows[step] += difference * sigma**i * value / math.factorial(i)
    return rows


def taylor_differences(schedule: Schedule, order: int, warmup: int = WARMUP) -> list[list[Array]]:
    """TaylorSeer's differences after every computed step, as coefficients [K] over the computed features.

    Entry i lists D_0, D_1, … up to ``order`` after computed step a_i: D_0 = F and D_{m+1}(i) = (D_m(i) - D_m(i-1)) divided
    by a_i - a_{i-1}. An order exists only if the one below existed one computed step earlier and a_i > warmup - 2.
    """
    unit, result = np.eye(len(schedule.compute)), []
    before: list[Array] = []
    for i, step in enumerate(schedule.compute):
        now = [unit[i]]
        if step > warmup - 2:
            for lower in before[:order]:
                now.append((now[-1] - lower) / (step - schedule.compute[i - 1]))
        result.append(now)
        before = now
    return result
