"""Forecast velocities by fitted weights on all earlier ones.

Citation:
    "L2P", arXiv 2604.26365, CVPR 2026; fit and full-step lists of the released code (Aredstone/L2P-Cache).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable, collapse, compose
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

L2P_STEPS = 50
L2P_LISTS = {  # tuned by hand, by the interval that the paper calls each after
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    6: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    10: (0, 1, 2, 4, 12, 24, 38),
    16: (0, 1, 2, 4, 16, 32),
}
FITS = ("closed", "adam")
LEARNING_RATE = 0.01
EPOCHS = 201
MOMENTS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class L2p(TableMethod):
    """v_t = sum_{j < t} W[t, j] v_j, forecasts fed back; output cut: one slot for each computed velocity.

    W has a row for every step but the first and is shared by all elements. It is fitted on uncached runs, every earlier
    velocity being true (teacher forcing), and so does not know the schedule: one fit serves all of them, but the error of
    feeding forecasts back is not in it, which hurts with long gaps. ``fit`` is ``closed`` (ridge least squares; ``ridge``
    is relative to the mean squared norm of a velocity) or ``adam`` (the published one: 201 epochs, rate 0.01, from reuse).
    """

    name: ClassVar[str] = "l2p"
    summary: ClassVar[str] = "forecast velocities by fitted weights on all earlier ones (L2P)"
    cut: ClassVar[Cut] = "output"
    needs_calibration: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7
    fit: str = "closed"
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InputError(f"fit is {self.fit!r}; l2p takes {' or '.join(FITS)}")
        if not self.ridge >= 0:
            raise InputError(f"ridge is {self.ridge}; it must not be negative")

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The hand-tuned list where there is one (50 steps, interval 5, 6, 7, 8, 10 or 16), else the counter rule."""
        if num_steps == L2P_STEPS and interval in L2P_LISTS:
            return Schedule(num_steps, L2P_LISTS[interval])
        return interval_schedule(num_steps, interval)

    def published(self, num_steps: int, budget: int) -> Schedule:
        return l2p_schedule(num_steps, budget)

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        gram = calibration.velocity_gram()
        weights = fit_adam(gram, calibration.num_elements) if self.fit == "adam" else fit_closed(gram, self.ridge)
        facts = {
            "method": self.name,
            "fit": self.fit,
            "steps": str(gram.shape[-1]),
            "prompts": str(len(gram)),
            "loss": f"{mean_squared_error(weights, gram, calibration.num_elements):.6g}",
        }
        return Parameters({"weights": weights}, facts, calibration.origin)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> AdvanceTable:
        if parameters is None:
            raise PredictorError("l2p needs fitted weights: run it through calibration first")
        weights, num = _weights(parameters), schedule.num_steps
        if weights.shape != (num, num):
            raise PredictorError(f"{parameters.origin} holds weights {list(weights.shape)}, but the schedule has {num} steps")
        rows = np.zeros_like(weights)  # newest first
        for step in range(1, num):
            rows[step, :step] = weights[step, :step][::-1]
        return collapse(compose(rows, np.zeros(num), schedule, feeds_back=True), sigmas)


def l2p_schedule(num_steps: int, budget: int) -> Schedule:
    """The hand-tuned list of L2P (arXiv 2604.26365) with ``budget`` computed steps, for 50 steps.

    Raises:
        InputError: there is none.
    """
    lists = {len(steps): steps for steps in L2P_LISTS.values()}
    if num_steps != L2P_STEPS or budget not in lists:
        known = ", ".join(str(count) for count in sorted(lists))
        raise InputError(
            f"L2P has no list of {budget} steps of {num_steps}; its lists are for {L2P_STEPS} steps, with {known} of them"
        )
    return Schedule(num_steps, lists[budget])


def _weights(parameters: Parameters) -> Array:
    if "weights" not in parameters.arrays:
        raise PredictorError(f"{parameters.origin} does not hold L2P weights: it has {sorted(parameters.arrays)}")
    return parameters.arrays["weights"]


def fit_closed(gram: Array, ridge: float) -> Array:
    """Weights [T, T], strictly lower-triangular: ridge least squares of every velocity on the earlier ones.

    ``gram`` [P, T, T] inner products of the velocities, by prompt; ``ridge`` relative to the mean diagonal of their sum.
    """
    pooled = np.asarray(gram, np.float64).sum(axis=0)
    num = len(pooled)
    penalty, weights = ridge * np.trace(pooled) / num, np.zeros((num, num))
    for step in range(1, num):
        normal = pooled[:step, :step] + penalty * np.eye(step)
        weights[step, :step] = np.linalg.lstsq(normal, pooled[:step, step], rcond=None)[0]
    return weights


def fit_adam(gram: Array, num_elements: int, epochs: int = EPOCHS) -> Array:
    """Weights [T, T], strictly lower-triangular, by the published full-batch Adam on :func:`mean_squared_error`.

    ``gram`` [P, T, T] inner products of the velocities, by prompt, of ``num_elements`` elements each. Starts from reuse. The
    loss is quadratic in the weights, so the Gram matrix gives the gradient that the velocities themselves would.
    """
    pooled = np.asarray(gram, np.float64).sum(axis=0)
    num = len(pooled)
    mask = np.tril(np.ones_like(pooled), -1)
    weights, first, second = np.diag(np.ones(num - 1), -1), np.zeros_like(pooled), np.zeros_like(pooled)
    scale = 2 / (len(gram) * max(num - 1, 1) * num_elements)
    for epoch in range(1, epochs + 1):
        gradient = scale * mask * (weights @ pooled - pooled)
        first = MOMENTS[0] * first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * second + (1 - MOMENTS[1]) * gradient**2
        mean, square = first / (1 - MOMENTS[0] ** epoch), second / (1 - MOMENTS[1] ** epoch)
        weights = weights - LEARNING_RATE * mean / (np.sqrt(square) + EPSILON)
    return weights


def mean_squared_error(weights: Array, gram: Array, num_elements: int) -> float:
    """Mean squared error of the teacher-forced forecasts of steps 1 … T - 1, over prompts, steps and elements."""
    pooled = np.asarray(gram, np.float64).sum(axis=0)[None]
    residual = np.eye(pooled.shape[-1])[1:] - weights[1:]  # over the velocities
    squares = np.einsum("ti,pij,tj->", residual, pooled, residual)
    return float(squares / (len(gram) * max(len(residual), 1) * num_elements))
