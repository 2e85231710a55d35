"""Extrapolate with a two-step predictor and a corrector towards the last computed features.

Citation:
    "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers", arXiv 2508.16211, AAAI 2026.
    No code of the authors could be read, and the paper's exact corrector is not verified: both forms here are cache-dit's.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

FORMS = ("anchored", "recursive")
REACH = 3  # anchored: how many steps a slope is followed


@dataclass(frozen=True)
class FoCa(TableMethod):
    """Order 1 in form, no warm-up of its own, hidden cut; forecasts are fed back.

    With F the last computed feature, P the computed one before it, and G, H the values of the last two steps (computed or
    forecast), a step e after F is forecast as

    - ``anchored``: F + e/2 ((F - P) + (G - H)) up to e = 3; beyond, that of e = 3 with weight 3/e and F with the rest;
    - ``recursive``: G + ((F - P) + (G - H)) / 2.

    Differences are not divided by the number of steps that they span: F - P is too steep by that number after a gap, so
    neither form is exact on lines, only on constants, and ``recursive`` blows up on long gaps (sum of absolute weights 73
    at N = 6, against 7). Forecasts carry the older features on through G - H, so nearly every computed feature keeps a slot
    (9 of 10 at 50 steps and N = 6).
    """

    name: ClassVar[str] = "foca"
    summary: ClassVar[str] = "extrapolate by a two-step predictor and corrector (FoCa, as in cache-dit)"
    default_interval: ClassVar[int] = 5
    min_budget: ClassVar[int] = 3
    form: str = "anchored"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"form is {self.form!r}; foca takes {' or '.join(FORMS)}")

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        unit = np.eye(len(schedule.compute))
        values = np.zeros((schedule.num_steps, len(unit)))  # every step's value in terms of the computed features
        newest = -1
        for step in range(schedule.start, schedule.num_steps):
            if newest + 1 < len(unit) and step == schedule.compute[newest + 1]:
                newest += 1
                values[step] = unit[newest]
            elif newest == 0:  # no difference to go by
                values[step] = unit[0]
            else:
                values[step] = self._forecast(
                    unit[newest], unit[newest - 1], values[step - 2 : step], step - schedule.compute[newest]
                )
        values[list(schedule.compute)] = 0.0
        return ForecastTable.of_rows(schedule, values)

    def _forecast(self, last: Array, before: Array, recent: Array, elapsed: int) -> Array:
        """``recent`` [2, K]: the values of the last two steps, oldest first."""
        slope = ((last - before) + (recent[1] - recent[0])) / 2
        weight = min(elapsed, REACH) * min(1.0, REACH / elapsed)
        value: Array = recent[1] + slope if self.form == "recursive" else last + weight * slope
        return value
