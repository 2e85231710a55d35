"""Which steps to compute: a search in the Gram domain, then closed-loop runs of the best few.

In the Gram domain every schedule's error follows from inner products of an uncached run, in microseconds; so thousands are
tried. It does not know how the model answers to latents that are off, so the best few are run for real on a few prompts.

Shapes: ``P`` prompts, ``G`` grid steps, ``K`` computed steps.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence

import numpy as np

from cachec.compiler.calibration.calibration import Calibration, decibels
from cachec.compiler.methods.base import Method, PredictorMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.errors import InputError, missing_extra
from cachec.runtime.specs import Array

if importlib.util.find_spec("scipy") is None:
    raise missing_extra("scipy", "fit", "searching schedules")
from scipy.linalg import solve_triangular

log = logging.getLogger(__name__)

Steps = tuple[int, ...]
Score = Callable[[Steps], float]  # of the computed steps; less is better

STARTS = 16  # hill climbs from other places
ANNEALING = (300, 0.3, 1e-3)  # moves, first and last temperature on the log of the score
FEW_PROMPTS = 8  # for closed-loop runs
FEW_SCHEDULES = 5  # that are run in closed loop
CLOSED_MOVES = 10  # closed-loop runs of neighbours of the best


class GramDomain:
    """Errors of schedules on the uncached run ``gram`` [G, G] (summed over prompts) of a ``sampling`` of G steps."""

    def __init__(self, gram: Array, sampling: Sampling) -> None:
        self.sigmas, self._shares = np.asarray(sampling.sigmas, np.float64), sampling.shares
        self._gram = gram + 1e-13 * np.trace(gram) / len(gram) * np.eye(len(gram))
        self.moves = sampling.moves  # [G + 1, G]: noise to node
        self._wanted = self._gram @ self.moves.T
        self._squares = np.einsum("eg,ge->e", self.moves, self._wanted)

    def least_squares(self, steps: Steps) -> Array:
        """Squared errors [K] that the best rows leave at the nodes after each computed step."""
        factor = np.linalg.cholesky(self._gram[np.ix_(steps, steps)])
        ends = [*steps[1:], len(self._gram)]
        explained = solve_triangular(factor, self._wanted[np.ix_(steps, ends)], lower=True, check_finite=False)
        errors: Array = self._squares[ends] - np.triu(explained**2).sum(axis=0)
        return errors.clip(min=0)

    def rows_errors(self, table: AdvanceTable) -> Array:
        """Squared errors [K] of given rows at the nodes after each computed step."""
        steps = list(table.schedule.compute)
        off = -self.moves[[*steps[1:], len(self._gram)]]
        off[:, steps] += table.coefficients
        errors: Array = np.einsum("kg,gh,kh->k", off, self._gram, off).clip(min=0)
        return errors

    def total(self, errors: Array, steps: Steps, *, weight: float = 1.0, power: float = 0.0) -> float:
        """The final error, and what the errors at nodes add to it, times ``weight`` and their noise level to a ``power``.

        A node that is off by e gives a velocity that is off in proportion, which acts over the next gap: gap * e^2. The power
        of the gap is a choice, not a derivation: on the reference model it ranked good schedules more as the closed loop does
        than plain sums or gap^2.
        """
        ends = [*steps[1:], len(self._gram)]
        gaps, errors = -np.diff(self.sigmas[ends]), errors * self._shares[ends] ** 2
        return float(errors[-1] + weight * (errors[:-1] * gaps * self.sigmas[ends[:-1]] ** power).sum())


def score_of(method: Method, calibration: Calibration, parameters: Parameters | None) -> Score:
    """How a method's schedules are scored in the Gram domain. Methods fitted to a schedule are scored by least squares."""
    if method.cut == "output":
        domain = GramDomain(calibration.velocity_gram().sum(axis=0), calibration.sampling)
        if method.schedule_bound:
            return lambda steps: domain.total(domain.least_squares(steps), steps)

        def score(steps: Steps) -> float:
            table = method.table(Schedule(calibration.num_steps, steps), calibration.sampling.levels(method.cut), parameters)
            assert isinstance(table, AdvanceTable)
            return domain.total(domain.rows_errors(table), steps)

        return score
    gram = calibration.feature_gram().sum(axis=0)

    def hidden_score(steps: Steps) -> float:
        schedule = Schedule(calibration.num_steps, steps)
        if method.schedule_bound:
            return hidden_least_squares(gram, calibration.sigmas, schedule)
        table = method.table(schedule, calibration.sigmas, parameters)
        assert isinstance(table, ForecastTable)
        return hidden_error(table, gram, calibration.sigmas)

    return hidden_score


def solver_score(rows: Callable[[Array], Array], calibration: Calibration) -> Score:
    """How a plain solver's time steps are scored; ``rows`` makes its rows [K, K] from noise levels [K + 1]."""
    domain = GramDomain(calibration.velocity_gram().sum(axis=0), calibration.sampling)

    def score(steps: Steps) -> float:
        table = AdvanceTable(Schedule(calibration.num_steps, steps), rows(domain.sigmas[[*steps, -1]]))
        return domain.total(domain.rows_errors(table), steps)

    return score


def hidden_error(table: ForecastTable, gram: Array, sigmas: Array) -> float:
    """Sum over forecast steps of the feature's error norm times the step in noise level.

    Features of neighbouring forecasts err alike, so their norms are added, not their squares. ``gram`` [T, T].
    """
    off = np.zeros((table.schedule.num_steps, len(gram)))
    off[:, list(table.schedule.compute)] = table.rows
    steps = list(table.schedule.forecast)
    off[steps, steps] -= 1
    errors = np.einsum("tg,gh,th->t", off[steps], gram, off[steps]).clip(min=0)
    return float(np.sqrt(errors) @ -np.diff(sigmas)[steps])


def hidden_least_squares(gram: Array, sigmas: Array, schedule: Schedule) -> float:
    """:func:`hidden_error` of the best rows."""
    steps, widths, total = schedule.compute, -np.diff(sigmas), 0.0
    jitter = 1e-12 * np.trace(gram) / len(gram)
    factor = np.linalg.cholesky(gram[np.ix_(steps, steps)] + jitter * np.eye(len(steps)))
    explained = solve_triangular(factor, gram[list(steps)], lower=True, check_finite=False)
    for step in schedule.forecast:
        past = sum(s < step for s in steps)
        error = gram[step, step] - (explained[:past, step] ** 2).sum()
        total += float(np.sqrt(max(error, 0.0)) * widths[step])
    return total


def search_schedules(score: Score, num_steps: int, budget: int, *, seed: int, starts: int | None = None) -> list[Steps]:
    """Local optima of ``score`` over ``budget`` of ``num_steps`` steps, the best first. Step 0 is always computed.

    Annealing and hill climbing from several places, ``STARTS`` unless told; deterministic from ``seed``.

    Raises:
        InputError: ``budget`` is not from 1 to ``num_steps``.
    """
    if not 1 <= budget <= num_steps:
        raise InputError(f"budget is {budget}; it must lie between 1 and the number of steps, {num_steps}")
    generator, known = np.random.default_rng(seed), dict[Steps, float]()

    def remembered(steps: Steps) -> float:
        if steps not in known:
            known[steps] = score(steps)
        return known[steps]

    even = tuple(sorted({round(i * num_steps / budget) for i in range(budget)}))
    places = [even, uniform_schedule(num_steps, budget).compute]
    while len(places) < (STARTS if starts is None else starts):
        others = generator.choice(np.arange(1, num_steps), budget - 1, replace=False)
        places.append(_anneal(remembered, (0, *sorted(others.tolist())), num_steps, generator))
    found = {_climb(remembered, place, num_steps) for place in places}
    log.info("schedule search: %d schedules scored", len(known))
    return sorted(found, key=lambda steps: (known[steps], steps))


def _anneal(score: Score, steps: Steps, num_steps: int, generator: np.random.Generator) -> Steps:
    """Simulated annealing on the log of the score, as BudCache moves: mostly one step, mostly not far."""
    moves, hot, cold = ANNEALING
    current = best = steps
    for number in range(moves):
        candidate = _moved(current, num_steps, generator)
        change = np.log(score(candidate) + 1e-300) - np.log(score(current) + 1e-300)
        if change < 0 or generator.random() < np.exp(-change / (hot * (cold / hot) ** (number / moves))):
            current = candidate
        if score(current) < score(best):
            best = current
    return best


def _moved(steps: Steps, num_steps: int, generator: np.random.Generator) -> Steps:
    if len(steps) in (1, num_steps):
        return steps
    index = int(generator.integers(1, len(steps)))
    near = generator.random() < 0.7
    reach = max(3, num_steps // 16)
    step = steps[index] + int(generator.integers(-reach, reach + 1)) if near else int(generator.integers(1, num_steps))
    moved = tuple(sorted({*steps[:index], *steps[index + 1 :], min(max(step, 1), num_steps - 1)}))
    return moved if len(moved) == len(steps) else steps


def _climb(score: Score, steps: Steps, num_steps: int) -> Steps:
    """Move one computed step at a time, by any distance, until none helps."""
    current, improved = steps, True
    while improved:
        improved = False
        for index in range(1, len(current)):
            options = [m for m in neighbours(current, num_steps, _distances(num_steps), (index,)) if score(m) < score(current)]
            if options:
                current, improved = min(options, key=lambda m: (score(m), m)), True
    return current


def _distances(num_steps: int) -> tuple[int, ...]:
    """1, 2, 3 and then growing by half."""
    distances, value = [1, 2], 3
    while value < num_steps:
        distances.append(value)
        value += value // 2
    return tuple(distances)


def neighbours(steps: Steps, num_steps: int, distances: Sequence[int], indices: Sequence[int] | None = None) -> list[Steps]:
    """Schedules with one computed step (one of ``indices``; not the first) moved by one of ``distances``."""
    result = []
    for index in range(1, len(steps)) if indices is None else indices:
        others = (*steps[:index], *steps[index + 1 :])
        places = {steps[index] + sign * distance for distance in distances for sign in (-1, 1)}
        result += [tuple(sorted((*others, step))) for step in sorted(places) if 0 < step < num_steps and step not in steps]
    return result


def polish_schedule(candidates: Sequence[Steps], closed: Score, num_steps: int, *, moves: int, seed: int) -> Steps:
    """The best of ``candidates`` by ``closed``, then improved by at most ``moves`` more closed-loop runs."""
    generator, known = np.random.default_rng(seed), {steps: closed(steps) for steps in candidates}
    best = min(known, key=lambda steps: (known[steps], steps))
    near = max(1, num_steps // 50)
    left = moves
    while left > 0:
        options = [m for m in neighbours(best, num_steps, (near, 2 * near)) if m not in known]
        if not options:
            break
        candidate = options[int(generator.integers(len(options)))]
        known[candidate] = closed(candidate)
        left -= 1
        if known[candidate] < known[best]:
            best = candidate
    return best


def best_paths(cost: Array, budget: int) -> Steps:
    """Exact dynamic programming: the path with the least sum of ``cost`` [T, T, T + 1] over (previous, newest, next).

    For objectives where a gap's error depends on the last two computed steps only (reuse, TaylorSeer of order 1). The first
    node has itself as its previous one. O(K T^3).
    """
    num_steps = len(cost)
    best = np.full((num_steps, num_steps), np.inf)  # by (previous, newest)
    best[0, 0] = 0.0
    parents = []
    for _ in range(budget - 1):
        reached = best[:, :, None] + cost[:, :, :num_steps]  # [previous, newest, next]
        parents.append(np.argmin(reached, axis=0))
        best = np.min(reached, axis=0)
    totals = best + cost[:, :, num_steps]
    previous, newest = divmod(int(np.argmin(totals)), num_steps)
    path = [newest]
    for parent in reversed(parents):
        before = int(parent[previous, newest])
        newest, previous = previous, before
        path.append(newest)
    return tuple(reversed(path))


def two_step_costs(method: PredictorMethod, calibration: Calibration, parameters: Parameters | None) -> Array:
    """Costs [T, T, T + 1] for :func:`best_paths` of a method that looks at two computed steps at most, by :func:`hidden_error`.

    Raises:
        InputError: the method looks at more.
    """
    if method.window > 2 or method.feeds_back:
        raise InputError(
            f"method {method.name!r} looks at more than two computed steps: its schedules are searched by climbing"
        )
    num, gram = calibration.num_steps, calibration.feature_gram().sum(axis=0)
    cost = np.full((num, num, num + 1), np.inf)
    widths = -np.diff(calibration.sigmas)
    for newest in range(num):
        for previous in range(newest) if newest and method.window == 2 else [0 if method.window == 2 else newest]:
            steps = (previous, newest) if previous != newest else (newest,)
            errors = _gap_errors(method, steps, calibration.sigmas, gram, parameters)
            cost[previous, newest, newest + 1 :] = np.concatenate([[0.0], np.cumsum(errors * widths[newest + 1 :])])
    if method.window == 1:  # whatever came before
        cost = np.broadcast_to(cost[range(num), range(num)][None], cost.shape).copy()
        cost[np.tri(num, num, 0, dtype=bool) & ~np.eye(num, dtype=bool)] = np.inf
        cost[np.eye(num, dtype=bool) & (np.arange(num) > 0)[:, None]] = np.inf
    return cost


def _gap_errors(method: PredictorMethod, steps: Steps, sigmas: Array, gram: Array, parameters: Parameters | None) -> Array:
    """Error norms [n] of forecasting every later step from ``steps``."""
    newest, num = steps[-1], len(sigmas) - 1
    norms = []
    for step in range(newest + 1, num):
        row = method.row(step, steps[::-1], sigmas, parameters)
        off = np.zeros(num)
        np.add.at(off, list(steps[::-1]), row[: len(steps)])
        off[step] -= 1
        norms.append(max(float(off @ gram @ off), 0.0) ** 0.5)
    return np.array(norms)


def few_prompts(calibration: Calibration) -> Calibration:
    """The prompts of closed-loop searches."""
    return calibration.select(range(min(FEW_PROMPTS, calibration.num_prompts)))


def closed_score(method: Method, calibration: Calibration, parameters: Parameters | None) -> Score:
    """Mean error in -dB of closed-loop runs on the calibration's prompts."""
    draft = method.draft()

    def score(steps: Steps) -> float:
        schedule = Schedule(calibration.num_steps, steps)
        fitted = draft.calibrate(calibration, schedule) if draft.schedule_bound else parameters
        try:
            return -decibels(calibration.errors(draft.table(schedule, calibration.sampling.levels(draft.cut), fitted)))
        except InputError as error:  # the forecasts blow up: as bad as can be, but another schedule may do
            log.info("schedule %s: %s", steps, error)
            return float("inf")

    return score


def search_schedule(
    method: Method, calibration: Calibration, parameters: Parameters | None, budget: int, *, seed: int, closed: bool = True
) -> Schedule:
    """The best schedule of ``budget`` computed steps that a search finds for a method.

    ``calibration``: the prompts to fit on. ``closed``: run the best few for real.

    Raises:
        InputError: ``budget`` is below what the method needs, or above the number of steps.
    """
    num_steps = calibration.num_steps
    if budget < method.min_budget:
        raise InputError(f"budget is {budget}, but {method.name} needs {method.min_budget} computed steps to start")
    if isinstance(method, PredictorMethod) and method.window <= 2 and not method.feeds_back and 1 <= budget <= num_steps:
        candidates = [best_paths(two_step_costs(method, calibration, parameters), budget)]
    else:
        candidates = search_schedules(score_of(method, calibration, parameters), num_steps, budget, seed=seed)
    if not closed or budget in (1, num_steps):
        return Schedule(num_steps, candidates[0])
    few = few_prompts(calibration)
    score = closed_score(method, few, parameters)
    return Schedule(num_steps, polish_schedule(candidates[:FEW_SCHEDULES], score, num_steps, moves=CLOSED_MOVES, seed=seed))
