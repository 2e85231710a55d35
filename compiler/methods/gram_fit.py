"""Fits of output-cut rows on latents that the rows themselves led to (closed loop), and their Gauss-Newton polish.

Shapes: ``P`` prompts, ``K`` computed steps, ``E`` elements of the latents, ``M`` free numbers.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from cachec.compiler.calibration.calibration import Calibration, decibels, relative_errors
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

RIDGES = tuple(10.0**power for power in range(-12, -1))  # relative to the mean squared norm of a velocity
FOLDS = 8
NUDGE = 1e-3  # finite difference, in units of the preconditioned coefficients and of timesteps
STEPS_PER_JACOBIAN = 2  # later ones with its weights and residuals anew
SOFTNESS = 0.5
TOLD = (0.01, 0.02, 0.04, 0.08)  # parts of a told time that are tried beside it, as long as they are better
DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # Levenberg-Marquardt, relative to each direction's own curvature


def node_timesteps(calibration: Calibration, schedule: Schedule) -> Array:
    """What the model is told at the computed steps [K], float64."""
    timesteps: Array = calibration.sampling.timesteps[list(schedule.compute)].astype(np.float64)
    return timesteps


def fit_rows(calibration: Calibration, schedule: Schedule, *, free_times: bool = False) -> AdvanceTable:
    """Least squares, node by node: the reference's displacement from noise on all velocities computed so far.

    Node i + 1 is reached with row i, so every row also repairs what the rows before it missed. The ridge of each row is
    chosen by cross-validation over prompts. With ``free_times`` the time that the model is told at each node is free, too: what
    brings the node after it nearest, of :data:`TOLD` (DyWeight's scale of time, arXiv 2603.11607).

    Raises:
        InputError: a run gives NaN or infinity.
    """
    fit, usual = _Nodes(calibration, schedule), node_timesteps(calibration, schedule)
    told = usual.copy()
    for i in range(len(told)):
        found = fit.reached(i, told[i])
        for sign in (-1, 1) if free_times else ():
            for part in TOLD:
                tried = told.copy()
                tried[i] = usual[i] * (1 + sign * part)
                if not _in_order(tried, calibration.sampling.timesteps):
                    break
                one = fit.reached(i, tried[i])
                if one.error >= found.error:
                    break
                found, told = one, tried
        fit.take(i, found)
    return AdvanceTable(schedule, fit.rows, told if free_times else None)


@dataclass(frozen=True, eq=False)
class _Reached:
    """A velocity [P, …] at a node, its ``products`` [P, n, n] with those before, and the row [n] that leads on.

    It leads to ``latents`` [P, …], whose squared errors sum to ``error``.
    """

    velocity: Array
    products: Array
    row: Array
    latents: Array
    error: float


class _Nodes:
    """Nodes that are fitted one after the other: ``rows`` [K, K] so far, on the latents that they lead to."""

    def __init__(self, calibration: Calibration, schedule: Schedule) -> None:
        self._calibration, self._schedule = calibration, schedule
        self._latents, num = calibration.noise(), len(schedule.compute)
        self._velocities = np.empty((num, *self._latents.shape), self._latents.dtype)
        self._products = np.zeros((len(self._latents), num, num))
        self.rows = np.zeros((num, num))

    def reached(self, i: int, told: float) -> _Reached:
        """The node after node ``i``, if the model is told this time there."""
        calibration, end = self._calibration, (*self._schedule.compute[1:], self._schedule.num_steps)[i]
        velocities, products = self._velocities[: i + 1], self._products[:, : i + 1, : i + 1].copy()
        velocities[i] = calibration.velocities(self._latents, float(told), self._schedule.compute[i])
        products[:, i] = products[:, :, i] = _inner(velocities, velocities[i])
        wanted = calibration.latents(end)
        target = _displaced(calibration, wanted, end)
        row = solve_row(products, _inner(velocities, target), _inner(target[None], target)[:, 0])
        latents = _moved(calibration, row, velocities, end)
        error = float(np.square(latents - wanted, dtype=np.float64).sum())
        return _Reached(velocities[i].copy(), products, row, latents, error)

    def take(self, i: int, found: _Reached) -> None:
        """Go on from there."""
        self._velocities[i], self._products[:, : i + 1, : i + 1] = found.velocity, found.products
        self.rows[i, : i + 1], self._latents = found.row, found.latents


def _displaced(calibration: Calibration, latents: Array, node: int) -> Array:
    """How far latents [P, …] at a node are from the noise, both divided by the noise's share in them."""
    share = latents.dtype.type(calibration.sampling.shares[node])
    displaced: Array = latents / share - calibration.noise()
    return displaced


def _moved(calibration: Calibration, row: Array, velocities: Array, node: int) -> Array:
    """Latents [P, …] at a node, from a row [n] over velocities [n, P, …]."""
    share = velocities.dtype.type(calibration.sampling.shares[node])
    moved: Array = share * (calibration.noise() + _weighted(row, velocities))
    return moved


def _weighted(weights: Array, values: Array) -> Array:
    """Sum [P, …] of values [n, P, …] by weights [n], in the values' precision."""
    total: Array = np.tensordot(weights.astype(values.dtype), values, 1)
    return total


def solve_row(products: Array, wanted: Array, squares: Array) -> Array:
    """Ridge least squares [n] from inner products by prompt; the ridge with the least cross-validated error.

    ``products`` [P, n, n] of the regressors, ``wanted`` [P, n] with the target, ``squares`` [P] of the target.
    """
    if len(products) < 2:
        return _ridge(products.sum(0), wanted.sum(0), RIDGES[0])
    folds = np.arange(len(products)) % min(FOLDS, len(products))
    costs = np.zeros(len(RIDGES))
    for fold in np.unique(folds):
        out, left = folds == fold, folds != fold
        g, b = products[left].sum(0), wanted[left].sum(0)
        for index, ridge in enumerate(RIDGES):
            row = _ridge(g, b, ridge)
            costs[index] += squares[out].sum() - 2 * row @ wanted[out].sum(0) + row @ products[out].sum(0) @ row
    return _ridge(products.sum(0), wanted.sum(0), RIDGES[int(np.argmin(costs))])


def _ridge(products: Array, wanted: Array, ridge: float) -> Array:
    size = len(wanted)
    solution: Array = np.linalg.solve(products + ridge * np.trace(products) / size * np.eye(size), wanted)
    return solution


def _inner(many: Array, one: Array) -> Array:
    """Inner products [P, n] in float64 of ``many`` [n, P, …] with ``one`` [P, …]."""
    rows = many.reshape(*many.shape[:2], -1).astype(np.float64).swapaxes(0, 1)
    result: Array = (rows @ _flat(one)[:, :, None])[:, :, 0]
    return result


def _flat(values: Array) -> Array:
    """Values [P, …] as rows [P, E], float64."""
    return values.reshape(len(values), -1).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Point:
    """Where a polish stands: rows [K, K], timesteps [K], and the velocities [K, P, …] and latents that they lead to."""

    rows: Array
    timesteps: Array
    velocities: Array
    latents: list[Array]  # before each computed step, then the final ones


def polish(calibration: Calibration, table: AdvanceTable, *, rounds: int, move_timesteps: bool = True) -> AdvanceTable:
    """Gauss-Newton on all rows and, with ``move_timesteps``, time steps at once; ``rounds`` Jacobians at most.

    The objective is the mean over prompts of log(e^2 + SOFTNESS * median e^2), e the error of the final latents: nearly the
    mean in decibels, but prompts that are well reached by luck do not rule the fit (without it held-out prompts gain less).
    The Jacobian is taken by finite differences: a number of node i only asks for the computed steps after it again.
    """
    point = _play(calibration, table.schedule, table.coefficients, _timesteps_of(calibration, table))
    soft = SOFTNESS * float(np.median(_squares(calibration, point)))
    for number in tqdm(range(rounds), desc="polishing", unit="round", disable=None, leave=False):
        moves = _moves(point, timesteps=move_timesteps, first=point.timesteps[0] != calibration.sampling.timesteps[0])
        moved = _gauss_newton(calibration, table.schedule, point, soft, moves)
        if moved is None:
            break
        point = moved
        log.info("polish round %d: %.2f dB", number + 1, decibels(_errors(calibration, point)))
    return AdvanceTable(table.schedule, point.rows, point.timesteps)


def _timesteps_of(calibration: Calibration, table: AdvanceTable) -> Array:
    return node_timesteps(calibration, table.schedule) if table.timesteps is None else table.timesteps


def _play(
    calibration: Calibration, schedule: Schedule, rows: Array, timesteps: Array, known: "_Point | None" = None, start: int = 0
) -> _Point:
    """Closed loop; what comes before computed step ``start`` is taken from ``known``, latents there are formed anew."""
    noise = calibration.noise()
    num, ends = len(rows), [*schedule.compute[1:], schedule.num_steps]
    velocities = np.empty((num, *noise.shape), noise.dtype) if known is None else known.velocities.copy()
    latents = [noise]
    if known is not None and start:
        moved = _moved(calibration, rows[start - 1, :start], velocities[:start], ends[start - 1])
        latents = [*known.latents[:start], moved]
    for i in range(start, num):
        velocities[i] = calibration.velocities(latents[i], float(timesteps[i]), schedule.compute[i])
        latents.append(_moved(calibration, rows[i, : i + 1], velocities[: i + 1], ends[i]))
    return _Point(rows, timesteps, velocities, latents)


def _errors(calibration: Calibration, point: _Point) -> Array:
    return relative_errors(point.latents[-1], calibration.latents(calibration.num_steps))


def _squares(calibration: Calibration, point: _Point) -> Array:
    """Squared errors [P] of the final latents, over the norm of the reference."""
    result: Array = _errors(calibration, point) ** 2
    return result


def _gauss_newton(
    calibration: Calibration, schedule: Schedule, point: _Point, soft: float, moves: list[tuple[Array, Array, int]]
) -> _Point | None:
    """Damped steps with one Jacobian; ``None`` if no damping gives a better score."""
    columns = np.stack([_slope(calibration, schedule, point, move) for move in moves])  # [M, P, E]
    products = np.stack([one @ one.T for one in (columns[:, p].astype(np.float64) for p in range(columns.shape[1]))])
    improved = None
    for _ in range(STEPS_PER_JACOBIAN):
        moved = _best_step(calibration, schedule, improved or point, soft, _Jacobian(moves, columns, products))
        if moved is None:
            break
        improved = moved
    return improved


@dataclass(frozen=True, eq=False)
class _Jacobian:
    """Directions, what each does to the final latents [M, P, E], and the inner products of that [P, M, M]."""

    moves: list[tuple[Array, Array, int]]
    columns: Array
    products: Array


def _best_step(calibration: Calibration, schedule: Schedule, point: _Point, soft: float, jacobian: _Jacobian) -> _Point | None:
    """The point after the best damped step; ``None`` if none gives a better score."""
    reference = calibration.latents(calibration.num_steps)
    residual = _flat(point.latents[-1] - reference)
    weights = 1 / ((residual**2).sum(axis=1) + soft * (_flat(reference) ** 2).sum(axis=1))
    curvature = np.tensordot(weights, jacobian.products, 1)
    pull = (residual * weights[:, None]).ravel()
    gradient = np.array([float(column.ravel().astype(np.float64) @ pull) for column in jacobian.columns])
    tried: dict[int, tuple[float, _Point | None]] = {}

    def reached(place: int) -> float:
        if place not in tried:
            moved = _stepped(calibration, schedule, point, jacobian, _solve_damped(curvature, gradient, DAMPINGS[place]))
            tried[place] = (math.inf if moved is None else _score(calibration, moved, soft), moved)
        return tried[place][0]

    best, start = len(DAMPINGS) // 2, _score(calibration, point, soft)  # the usual best
    while best > 0 and reached(best - 1) < reached(best):
        best -= 1
    while best + 1 < len(DAMPINGS) and (reached(best) >= start or reached(best + 1) < reached(best)):
        best += 1
    return tried[best][1] if reached(best) < start else None


def _solve_damped(curvature: Array, gradient: Array, damping: float) -> Array:
    scale = np.diag(curvature)
    step: Array = -np.linalg.solve(curvature + damping * np.diag(scale + 1e-9 * scale.max()), gradient)
    return step


def _stepped(calibration: Calibration, schedule: Schedule, point: _Point, jacobian: _Jacobian, step: Array) -> _Point | None:
    """The point after a step; ``None`` if it leaves the order of the time steps, or the region where the model is finite."""
    rows = point.rows + sum(size * d_rows for size, (d_rows, _, _) in zip(step, jacobian.moves, strict=True))
    timesteps = point.timesteps + sum(size * d_time for size, (_, d_time, _) in zip(step, jacobian.moves, strict=True))
    if not _in_order(timesteps, calibration.sampling.timesteps):
        return None
    try:
        return _play(calibration, schedule, rows, timesteps)
    except InputError:
        return None


def _in_order(timesteps: Array, own: Array) -> bool:
    """Do told times [K] run as the sampler's own [T] do, and within what these are?"""
    if own[-1] < own[0]:
        return bool((np.diff(timesteps) < 0).all() and timesteps[0] <= own[0] and timesteps[-1] > 0)
    return bool((np.diff(timesteps) > 0).all() and own[0] <= timesteps[0] and timesteps[-1] <= own[-1])


def _score(calibration: Calibration, point: _Point, soft: float) -> float:
    return float(np.mean(np.log(_squares(calibration, point) + soft)))


def _moves(point: _Point, *, timesteps: bool, first: bool = False) -> list[tuple[Array, Array, int]]:
    """Directions of the search: change of rows [K, K] and of timesteps [K], and the first computed step that notices.

    Rows move along the whitened velocities, so that a unit of any direction moves the latents by as much; timesteps in units
    of the largest; the ``first`` one only where it is not the sampler's own.
    """
    num, unit = len(point.rows), np.abs(point.timesteps).max()
    moves: list[tuple[Array, Array, int]] = []
    for i in range(num):
        flat = _flat(point.velocities[: i + 1])
        values, vectors = np.linalg.eigh(flat @ flat.T / flat.shape[1])
        for value, vector in zip(values, vectors.T, strict=True):
            if value > 1e-10 * values[-1]:
                rows = np.zeros((num, num))
                rows[i, : i + 1] = vector / np.sqrt(value)
                moves.append((rows, np.zeros(num), i + 1))
        if timesteps and (i or first):
            told = np.zeros(num)
            told[i] = unit
            moves.append((np.zeros((num, num)), told, i))
    return moves


def _slope(calibration: Calibration, schedule: Schedule, point: _Point, move: tuple[Array, Array, int]) -> Array:
    """Derivative [P, E] of the final latents along a move."""
    d_rows, d_timesteps, start = move
    if start == len(point.rows):  # the last row acts on the final latents directly
        share = calibration.sampling.shares[-1]
        exact: Array = _weighted(share * d_rows[-1], point.velocities).reshape(len(point.latents[-1]), -1)
        return exact
    nudged = _play(calibration, schedule, point.rows + NUDGE * d_rows, point.timesteps + NUDGE * d_timesteps, point, start)
    slope: Array = (nudged.latents[-1] - point.latents[-1]).reshape(len(point.latents[-1]), -1) / NUDGE
    return slope
