"""Extrapolate the polynomial through the last computed features.

Citation:
    Newton's divided differences, on the steps at which features were computed. What TaylorSeer (arXiv 2503.06923) would be
    with divided instead of plain differences.
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


@dataclass(frozen=True)
class Newton(TableMethod):
    """Order ``order``, no warm-up of its own, ``order + 1`` slots, hidden cut.

    Exact on features that are polynomials of that degree in the step; of a lower one while there are fewer features. Large
    intervals at high order amplify errors: at order 2 and N = 6 the sum of absolute weights is 5.7 on the last step of a
    gap, and 71 in the first gap, where the warm-up's features lie one step apart.
    """

    name: ClassVar[str] = "newton"
    summary: ClassVar[str] = "extrapolate the polynomial through the last features (divided differences)"
    default_interval: ClassVar[int] = 6
    order: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 8:
            raise InputError(f"order is {self.order}; newton takes 0 to 8")

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        computed = np.array(schedule.compute)
        rows = np.zeros((schedule.num_steps, len(computed)))
        for step in schedule.forecast:
            columns = np.flatnonzero(computed < step)[-self.order - 1 :]
            rows[step, columns] = extrapolation_weights(computed[columns], step)
        return ForecastTable.of_rows(schedule, rows)


def extrapolation_weights(nodes: Array, at: float) -> Array:
    """Weights [W] on the values at distinct ``nodes`` [W] that give their polynomial's value ``at`` a point (Lagrange)."""
    weights = np.ones(len(nodes))
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        weights[j] = np.prod((at - others) / (node - others))
    return weights
