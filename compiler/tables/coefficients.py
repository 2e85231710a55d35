"""Tables: a whole schedule as numbers, for either cut, and the algebra that makes them. Pure data.

Shapes: ``T`` steps, ``G`` groups, ``K`` computed steps, ``W`` window.
"""

from dataclasses import dataclass

import numpy as np

from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import PredictorError
from cachec.runtime.specs import Array


@dataclass(frozen=True, eq=False)
class ForecastTable:
    """Hidden cut, a whole schedule as numbers: group g of step s is ``sum_a coefficients[s, g, a] F_a + bias[s]``.

    ``F_a`` is the group's part of what is kept of the computed feature a. ``coefficients`` [T, G, K] over the K computed
    features in order, ``bias`` [T]; float64. Rows of computed steps are zero. With a ``bias`` [T, 2] the groups are the two
    branches of guidance, the negative one first.
    """

    schedule: Schedule
    coefficients: Array
    bias: Array

    @classmethod
    def of_rows(cls, schedule: Schedule, *groups: Array) -> "ForecastTable":
        """A table without bias from the rows [T, K] of each group."""
        return cls(schedule, np.stack(groups, axis=1), np.zeros(schedule.num_steps))

    @classmethod
    def of_branches(cls, negative: "ForecastTable", positive: "ForecastTable") -> "ForecastTable":
        """Each branch of guidance by numbers of its own, from tables of one group and schedule."""
        both = negative, positive
        bias = np.stack([one.bias for one in both], axis=1)
        return cls(positive.schedule, np.concatenate([one.coefficients for one in both], axis=1), bias)

    @property
    def rows(self) -> Array:
        """Rows [T, K] of a table of one group.

        Raises:
            PredictorError: it has several.
        """
        if self.coefficients.shape[1] != 1:
            raise PredictorError(f"a forecast in {self.coefficients.shape[1]} groups is no one row a step: give a schedule")
        rows: Array = self.coefficients[:, 0]
        return rows


@dataclass(frozen=True, eq=False)
class AdvanceTable:
    """Output cut, a whole schedule as numbers: computed step i moves the latents to the next computed step (or the end).

    Divided by the noise's share (``Sampling``), they become the noise plus ``sum_{j <= i} coefficients[i, j] v_j``, with
    ``v_j`` the computed velocities in order; flows keep the noise's share at 1.
    ``coefficients`` [K, K] lower-triangular, float64. ``timesteps`` [K]: what the model is told at the computed steps, where
    that is not the sampler's own (polished time steps); else ``None``.
    """

    schedule: Schedule
    coefficients: Array
    timesteps: Array | None = None


Table = ForecastTable | AdvanceTable


def compose(rows: Array, bias: Array, schedule: Schedule, *, feeds_back: bool) -> ForecastTable:
    """Write every forecast in terms of computed features only (affine maps compose): a table of one group.

    ``rows`` [T, W] and ``bias`` [T] are over each step's history, newest first. Float64 throughout.
    """
    num_steps, window = rows.shape
    index = {step: column for column, step in enumerate(schedule.compute)}
    full = np.zeros((num_steps, len(index)))  # every step's feature in terms of the computed ones
    offset = np.zeros(num_steps)
    for step in range(schedule.start, num_steps):
        if step in index:
            full[step, index[step]] = 1.0
            continue
        history = list(schedule.history(step, window, feeds_back=feeds_back))
        full[step] = rows[step] @ full[history]
        offset[step] = rows[step] @ offset[history] + bias[step]
    computed = list(schedule.compute)
    full[computed], offset[computed] = 0.0, 0.0
    return ForecastTable(schedule, full[:, None], offset)


def collapse(table: ForecastTable, clock: Array) -> AdvanceTable:
    """Forecasts of velocities under Euler's steps along ``clock`` [T + 1], one row for each gap between computed steps."""
    schedule, steps = table.schedule, np.diff(np.asarray(clock, np.float64))
    velocities = table.rows.copy()  # every step's velocity in terms of the computed ones
    velocities[list(schedule.compute), range(len(schedule.compute))] = 1.0
    if table.bias.any():
        raise PredictorError("a forecast of velocities with a bias cannot be collapsed to rows")
    displacement = np.cumsum(steps[:, None] * velocities, axis=0)
    ends = [*(step - 1 for step in schedule.compute[1:]), schedule.num_steps - 1]
    return AdvanceTable(schedule, displacement[ends])
