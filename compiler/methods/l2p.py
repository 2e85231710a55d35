"""Forecast velocities by fitted weights on all earlier ones.

Citation:
    "L2P", arXiv 2604.26365, CVPR 2026; fit and full-step lists of the released code (Aredstone/L2P-Cache).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.released import Released, check_no_pickle, one_file
from cachec.compiler.tables.coefficients import AdvanceTable, collapse, compose
from cachec.compiler.tables.published import L2P_LISTS, L2P_STEPS
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError, PredictorError, in_one_line, unknown_name
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

FITS = ("closed", "adam")
L2P_LICENSE = "FLUX.1-dev Non-Commercial License (weights fitted to that model)"
MAX_TEXT = 8 << 20  # bytes of a released list
NO_NUMBERS = re.compile(rb"[^\[\]0-9eE+\-.,\s]")
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
    released: ClassVar[str | None] = "predictor/weight.txt of Aredstone/L2P-Cache, for FLUX.1-dev with 50 steps"
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

    @classmethod
    def read_released(cls, paths: Sequence[Path], options: Mapping[str, str]) -> Released:
        """The released list of rows: row r weighs the velocities of steps 0 … r, for step r + 1."""
        if options:
            raise unknown_name("option of import l2p", next(iter(options)), ())
        rows = read_rows(one_file(paths, cls.name))
        weights = np.zeros_like(rows)
        weights[1:] = rows[:-1]  # the last row is of a step behind the end
        return Released({"weights": weights}, {"steps": str(len(rows)), "released_for": "FLUX.1-dev"}, L2P_LICENSE)

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


def read_rows(path: Path) -> Array:
    """Rows [T, T], lower-triangular, of a text file that is one list of lists of numbers. Nothing in it is ever evaluated.

    Raises:
        PredictorError: it holds anything else, or rows that do not fit.
    """
    check_no_pickle(path)
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT + 1)
    if len(raw) > MAX_TEXT or NO_NUMBERS.search(raw):
        raise PredictorError(f"{path} is no list of lists of numbers, or longer than {MAX_TEXT >> 20} MB")
    try:
        found = json.loads(raw)
        rows = np.array(_of_one_length(found), np.float64)
    except (ValueError, OverflowError, RecursionError) as error:
        raise PredictorError(f"{path} does not read as a list of lists of numbers: {in_one_line(error)}") from error
    if rows.ndim != 2 or rows.shape[0] != rows.shape[1] or len(rows) < 2 or not np.isfinite(rows).all():
        raise PredictorError(
            f"{path} holds numbers of shape {list(rows.shape)}; L2P has as many rows as steps, and as long ones"
        )
    if np.triu(rows, 1).any():
        raise PredictorError(f"{path}: a row weighs a step that is not before its own")
    return rows


def _of_one_length(found: Any) -> Any:
    """The same; ``ValueError`` if it is a list of lists that are not of one length."""
    if isinstance(found, list) and all(isinstance(row, list) for row in found) and len({len(row) for row in found}) > 1:
        lengths = sorted({len(row) for row in found})
        raise ValueError(f"its rows have {lengths[0]} to {lengths[-1]} numbers, and have to be equally long")
    return found


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
