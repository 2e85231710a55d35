"""Schedules in the Gram domain against brute force: on raw vectors, and over all schedules of a few steps."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from toy_calibration import make_calibration, raw_runs, sigmas_of

import cachec.compiler.planning.search as module
from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.bns import Bns
from cachec.compiler.methods.gram import Gram
from cachec.compiler.methods.gram_fit import fit_rows
from cachec.compiler.methods.gram_hidden import GramHidden
from cachec.compiler.methods.l2p import L2p
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.planning.search import (
    GramDomain,
    best_paths,
    closed_score,
    few_prompts,
    hidden_error,
    hidden_least_squares,
    neighbours,
    polish_schedule,
    score_of,
    search_schedule,
    search_schedules,
    solver_score,
    two_step_costs,
)
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.samplers import solver_rows
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

STEPS = 12
SCHEDULES = [(0,), (0, 11), (0, 2, 5, 8), tuple(range(STEPS))]
each_schedule = pytest.mark.parametrize("steps", SCHEDULES, ids=str)


def vectors(seed=0, num_steps=STEPS, size=30):
    """Smooth curves of vectors [T, E] with some noise on them, as velocities are."""
    generator = np.random.default_rng(seed)
    t = np.linspace(0, 1, num_steps)[:, None]
    smooth = sum(generator.standard_normal(size) * t**power for power in range(4))
    return smooth + 0.2 * generator.standard_normal((num_steps, size))


def moves_of(sigmas, steps):
    """From the noise to the node after each computed step: [K, G], by hand."""
    ends = [*steps[1:], len(sigmas) - 1]
    return np.array([[sigmas[g + 1] - sigmas[g] if g < end else 0.0 for g in range(len(sigmas) - 1)] for end in ends])


def all_schedules(num_steps, budget):
    return [(0, *rest) for rest in combinations(range(1, num_steps), budget - 1)]


@each_schedule
def test_least_squares_equals_lstsq_on_the_vectors(steps):
    v, sigmas = vectors(), sigmas_of(STEPS)
    expected = []
    for i, move in enumerate(moves_of(sigmas, steps)):
        design, target = v[list(steps[: i + 1])].T, move @ v
        row = np.linalg.lstsq(design, target, rcond=None)[0]
        expected.append(((design @ row - target) ** 2).sum())
    got = GramDomain(v @ v.T, Sampling(sigmas, sigmas[:-1])).least_squares(steps)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


@each_schedule
def test_errors_of_rows_equal_those_on_the_vectors(steps):
    v, sigmas, num = vectors(), sigmas_of(STEPS), len(steps)
    rows = np.tril(np.random.default_rng(1).standard_normal((num, num)))
    expected = [((rows[i] @ v[list(steps)] - move @ v) ** 2).sum() for i, move in enumerate(moves_of(sigmas, steps))]
    got = GramDomain(v @ v.T, Sampling(sigmas, sigmas[:-1])).rows_errors(AdvanceTable(Schedule(STEPS, steps), rows))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_errors_at_nodes_count_by_the_gap_behind_them():
    domain = GramDomain(np.eye(4), Sampling(np.array([1.0, 0.7, 0.4, 0.2, 0.0]), np.zeros(4)))
    assert domain.total(np.array([3.0, 5.0, 7.0]), (0, 1, 3)) == pytest.approx(7 + 3 * (0.7 - 0.2) + 5 * 0.2)
    assert domain.total(np.array([7.0]), (0,)) == 7


def feature_errors(v, steps):
    """Norms of what least squares leaves of every forecast vector, by step."""
    result = {}
    for step in set(range(len(v))) - set(steps):
        design = v[[s for s in steps if s < step]].T
        result[step] = np.linalg.norm(design @ np.linalg.lstsq(design, v[step], rcond=None)[0] - v[step])
    return result


@pytest.mark.parametrize("num_steps", [50, 200])
def test_runs_in_a_few_dimensions_are_no_problem(num_steps):
    v, sigmas = np.random.default_rng(0).standard_normal((num_steps, 2)), sigmas_of(num_steps)
    gram, steps = v @ v.T, tuple(range(0, num_steps, 2))
    assert GramDomain(gram, Sampling(sigmas, sigmas[:-1])).least_squares(steps)[-1] < 1e-5 * np.trace(gram)
    expected = sum(error * (sigmas[step] - sigmas[step + 1]) for step, error in feature_errors(v, steps).items())
    got = hidden_least_squares(gram, sigmas, Schedule(num_steps, steps))
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


@each_schedule
def test_the_error_of_features_equals_that_on_the_vectors(steps):
    v, sigmas, schedule = vectors(), sigmas_of(STEPS), Schedule(STEPS, steps)
    coefficients = np.random.default_rng(1).standard_normal((STEPS, len(steps)))
    coefficients[list(steps)] = 0
    expected = sum(
        np.linalg.norm(coefficients[s] @ v[list(steps)] - v[s]) * (sigmas[s] - sigmas[s + 1]) for s in schedule.forecast
    )
    got = hidden_error(ForecastTable.of_rows(schedule, coefficients), v @ v.T, sigmas)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


@each_schedule
def test_least_squares_of_features_equals_lstsq_on_the_vectors(steps):
    v, sigmas = vectors(), sigmas_of(STEPS)
    expected = sum(error * (sigmas[step] - sigmas[step + 1]) for step, error in feature_errors(v, steps).items())
    got = hidden_least_squares(v @ v.T, sigmas, Schedule(STEPS, steps))
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)


# Exact search


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


SHORT = (Reuse(), Taylor(0), Taylor(1))  # methods that look at two computed steps at most
each_short = pytest.mark.parametrize("method", SHORT, ids=str)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@each_short
def test_best_paths_are_the_best_of_all_schedules(method, num_steps):
    calibration = make_calibration(num_steps=num_steps)
    gram, cost = calibration.feature_gram().sum(axis=0), two_step_costs(method, calibration, None)
    for budget in range(1, num_steps + 1):
        errors = {
            steps: hidden_error(method.table(Schedule(num_steps, steps), calibration.sigmas, None), gram, calibration.sigmas)
            for steps in all_schedules(num_steps, budget)
        }
        found = best_paths(cost, budget)
        assert errors[found] == pytest.approx(min(errors.values()), rel=1e-6, abs=1e-9)


@each_short
def test_costs_of_gaps_add_up_to_the_error_of_the_schedule(method, calibration):
    gram, cost = calibration.feature_gram().sum(axis=0), two_step_costs(method, calibration, None)
    for steps in [*SCHEDULES, (0, 3), (0, 1, 3), (0, 2, 3, 7)]:
        path = (0, *steps, STEPS)  # the first computed step has itself as its previous one
        total = sum(cost[path[i : i + 3]] for i in range(len(steps)))
        table = method.table(Schedule(STEPS, steps), calibration.sigmas, None)
        assert total == pytest.approx(hidden_error(table, gram, calibration.sigmas), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("num_steps", [3, 7])
def test_best_paths_on_random_costs(num_steps):
    cost = np.random.default_rng(0).random((num_steps, num_steps, num_steps + 1))
    p, n, x = np.indices(cost.shape)
    cost[(x <= n) | (p > n) | ((p == n) & (n > 0))] = np.inf

    def total(steps):
        path = (0, *steps, num_steps)
        return sum(cost[path[i : i + 3]] for i in range(len(steps)))

    for budget in range(1, num_steps + 1):
        assert best_paths(cost, budget) == min(all_schedules(num_steps, budget), key=total)


@pytest.mark.parametrize("method", [Taylor(2), Lesa()], ids=str)
def test_methods_that_look_further_back_have_no_costs_of_gaps(method, calibration):
    with pytest.raises(InputError, match="looks at more than two computed steps"):
        two_step_costs(method, calibration, None)


# Search by climbing


def random_score(seed, num_steps):
    v = vectors(seed, num_steps)
    domain = GramDomain(v @ v.T, Sampling(sigmas_of(num_steps), sigmas_of(num_steps)[:-1]))
    return lambda steps: domain.total(domain.least_squares(steps), steps)


@pytest.mark.parametrize(("num_steps", "budget"), [(10, 4), (10, 2), (8, 6)])
def test_the_search_finds_the_best_of_all_schedules(num_steps, budget):
    score = random_score(2, num_steps)
    found = search_schedules(score, num_steps, budget, seed=0)
    assert found[0] == min(all_schedules(num_steps, budget), key=score)


def test_what_is_found_are_schedules_the_best_first_each_once():
    score = random_score(7, 24)
    found = search_schedules(score, 24, 6, seed=0)
    assert len(found) > 1
    assert len(set(found)) == len(found)
    assert [score(steps) for steps in found] == sorted(score(steps) for steps in found)
    for steps in found:
        assert len(Schedule(24, steps).compute) == 6


def test_nothing_found_has_a_better_neighbour():
    score = random_score(3, 20)
    for steps in search_schedules(score, 20, 5, seed=0):
        assert all(score(near) >= score(steps) for near in neighbours(steps, 20, (1, 2, 3)))


def test_the_search_is_deterministic_from_its_seed(quick):
    score, scored = random_score(1, 30), {0: [], 1: [], 2: []}

    def watched(run):
        return lambda steps: (scored[run].append(steps), score(steps))[1]

    first, same = (search_schedules(watched(run), 30, 7, seed=5) for run in (0, 1))
    search_schedules(watched(2), 30, 7, seed=6)
    assert first == same
    assert scored[0] == scored[1] != scored[2]


def test_no_schedule_is_scored_twice():
    scored, score = [], random_score(2, 20)
    search_schedules(lambda steps: (scored.append(steps), score(steps))[1], 20, 5, seed=0)
    assert len(scored) == len(set(scored))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9])
def test_one_step_and_all_steps_leave_no_choice(num_steps):
    score = random_score(0, num_steps)
    assert search_schedules(score, num_steps, 1, seed=0) == [(0,)]
    assert search_schedules(score, num_steps, num_steps, seed=0) == [tuple(range(num_steps))]


@pytest.mark.parametrize("budget", [0, -1, 11])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(InputError, match=f"budget is {budget}; it must lie between 1 and the number of steps, 10"):
        search_schedules(random_score(0, 10), 10, budget, seed=0)


@pytest.mark.parametrize("steps", [(0,), (0, 3, 4, 9), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)])
@pytest.mark.parametrize("distances", [(1,), (1, 2, 3, 4, 6, 9)])
def test_neighbours_move_one_step_by_a_distance_never_the_first(steps, distances):
    found = neighbours(steps, 10, distances)
    expected = {
        other
        for other in all_schedules(10, len(steps))
        if len(lost := set(steps) - set(other)) == 1 and abs(lost.pop() - (set(other) - set(steps)).pop()) in distances
    }
    # a step may also land on the far side of its neighbours; what counts is which step went and which one came
    assert set(found) == expected
    assert len(found) == len(set(found))


def test_neighbours_of_some_steps_only():
    assert neighbours((0, 3, 6), 10, (1,), (1,)) == [(0, 2, 6), (0, 4, 6)]
    assert neighbours((0, 1, 2), 3, (1, 2)) == []


# Polishing by closed-loop runs


def counted(score):
    calls = []

    def closed(steps):
        calls.append(steps)
        return score(steps)

    return closed, calls


@pytest.mark.parametrize("moves", [0, 5])
def test_polishing_a_schedule_keeps_to_its_number_of_runs_and_returns_the_best_seen(moves):
    score = random_score(4, 30)
    closed, calls = counted(score)
    candidates = [(0, 5, 10, 15), (0, 1, 2, 3), (0, 10, 20, 25)]
    best = polish_schedule(candidates, closed, 30, moves=moves, seed=0)
    assert len(calls) == len(set(calls)) == len(candidates) + moves
    assert calls[:3] == candidates
    assert best == min(calls, key=score)


def test_polishing_moves_on_from_what_is_better():
    """From the far end to the start, a step at a time: only a walk gets there."""
    closed, _ = counted(lambda steps: sum(steps))
    assert polish_schedule([(0, 20)], closed, 30, moves=200, seed=0) == (0, 1)


def test_polishing_stops_when_every_neighbour_is_known():
    closed, calls = counted(lambda steps: -steps[1])
    assert polish_schedule([(0, 1)], closed, 4, moves=50, seed=0) == (0, 3)
    assert len(calls) == 3
    closed, calls = counted(len)
    assert polish_schedule([(0,)], closed, 4, moves=50, seed=0) == (0,)
    assert calls == [(0,)]


def test_polishing_is_deterministic_from_its_seed():
    runs = []
    for seed in (0, 0, 1):
        closed, calls = counted(random_score(4, 30))
        polish_schedule([(0, 5, 10, 15)], closed, 30, moves=10, seed=seed)
        runs.append(calls)
    assert runs[0] == runs[1] != runs[2]


# Scores of methods, and the whole of it


def test_output_methods_are_scored_on_velocities(calibration):
    velocities, _ = raw_runs(calibration)
    v, steps = velocities.transpose(1, 0, 2).reshape(STEPS, -1), (0, 2, 5, 8)
    domain = GramDomain(v @ v.T, calibration.sampling)
    table = Adams(2).table(Schedule(STEPS, steps), calibration.sigmas, None)
    assert score_of(Adams(2), calibration, None)(steps) == pytest.approx(domain.total(domain.rows_errors(table), steps))
    parameters = L2p().calibrate(calibration, Schedule(STEPS, steps))
    table = L2p().table(Schedule(STEPS, steps), calibration.sigmas, parameters)
    assert score_of(L2p(), calibration, parameters)(steps) == pytest.approx(domain.total(domain.rows_errors(table), steps))
    for method in (Gram(), Bns()):
        fitted = domain.total(domain.least_squares(steps), steps)
        assert score_of(method, calibration, None)(steps) == pytest.approx(fitted, rel=1e-6)


def test_hidden_methods_are_scored_on_features(calibration):
    _, features = raw_runs(calibration)
    v, schedule = features.transpose(1, 0, 2).reshape(STEPS, -1), Schedule(STEPS, (0, 2, 5, 8))
    table = Taylor(2).table(schedule, calibration.sigmas, None)
    expected = hidden_error(table, v @ v.T, calibration.sigmas)
    assert score_of(Taylor(2), calibration, None)(schedule.compute) == pytest.approx(expected)
    expected = hidden_least_squares(v @ v.T, calibration.sigmas, schedule)
    assert score_of(GramHidden(), calibration, None)(schedule.compute) == pytest.approx(expected, rel=1e-6)


def test_plain_solvers_are_scored_at_their_own_noise_levels(calibration):
    domain = GramDomain(calibration.velocity_gram().sum(axis=0), calibration.sampling)
    steps = (0, 2, 5, 8)
    score = solver_score(lambda sigmas: solver_rows("ab2", sigmas), calibration)
    rows = solver_rows("ab2", calibration.sigmas[[*steps, STEPS]])
    assert score(steps) == pytest.approx(domain.total(domain.rows_errors(AdvanceTable(Schedule(STEPS, steps), rows)), steps))
    assert score(steps) == pytest.approx(score_of(Adams(2), calibration, None)(steps))


def test_closed_scores_are_decibels_of_real_runs(calibration):
    steps = (0, 2, 5, 8)
    schedule = Schedule(STEPS, steps)
    assert closed_score(Gram(polish=3), calibration, None)(steps) == -decibels(
        calibration.errors(fit_rows(calibration, schedule))
    )
    table = Taylor(1).table(schedule, calibration.sigmas, None)
    assert closed_score(Taylor(1), calibration, None)(steps) == -decibels(calibration.errors(table))


def test_closed_searches_use_few_prompts():
    many = make_calibration(11)
    assert few_prompts(many).num_prompts == module.FEW_PROMPTS
    np.testing.assert_array_equal(few_prompts(many).noise(), many.noise()[: module.FEW_PROMPTS])
    assert few_prompts(make_calibration(3)).num_prompts == 3


METHODS = [Taylor(1), Taylor(2), Adams(2), Gram(), GramHidden()]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "STARTS", 4)
    monkeypatch.setattr(module, "ANNEALING", (40, 0.3, 1e-3))


@each_method
@pytest.mark.parametrize("budget", [1, STEPS])
def test_any_method_with_one_step_or_all_of_them(method, budget, calibration, quick):
    if budget < method.min_budget:
        with pytest.raises(InputError, match=f"needs {method.min_budget} computed steps to start"):
            search_schedule(method, calibration, None, budget, seed=0)
        return
    steps = tuple(range(budget))
    assert search_schedule(method, calibration, None, budget, seed=0) == Schedule(STEPS, steps)


@each_method
def test_closed_loop_runs_only_help_and_find_the_same_again(method, calibration, quick):
    score = closed_score(method, few_prompts(calibration), None)
    opened = search_schedule(method, calibration, None, 4, seed=0, closed=False)
    closed = search_schedule(method, calibration, None, 4, seed=0)
    assert len(closed.compute) == 4
    assert score(closed.compute) <= score(opened.compute)
    assert search_schedule(method, calibration, None, 4, seed=0) == closed


def test_without_closed_loops_the_model_is_not_run(calibration, quick, monkeypatch):
    monkeypatch.setattr(type(calibration.evaluator), "_evaluate", None)
    for method in METHODS:
        assert len(search_schedule(method, calibration, None, 4, seed=0, closed=False).compute) == 4


def test_the_number_of_closed_loop_runs_is_bounded(calibration, quick, monkeypatch):
    runs, real = [], type(calibration).errors
    monkeypatch.setattr(type(calibration), "errors", lambda self, table: (runs.append(table), real(self, table))[1])
    search_schedule(Gram(), calibration, None, 4, seed=0)
    assert module.CLOSED_MOVES < len(runs) <= module.CLOSED_MOVES + module.FEW_SCHEDULES
    assert all(isinstance(table, AdvanceTable) and table.timesteps is None for table in runs)  # drafts: not polished


@each_method
@pytest.mark.parametrize("budget", [STEPS + 1, 0])
def test_a_budget_that_no_schedule_has_is_refused(method, budget, calibration, quick):
    with pytest.raises(InputError, match=f"budget is {budget}"):
        search_schedule(method, calibration, None, budget, seed=0)


@dataclass(frozen=True)
class Needy(Adams):
    min_budget = 3


def test_a_budget_below_what_the_method_needs_is_refused(calibration, quick):
    with pytest.raises(InputError, match="budget is 2, but adams needs 3 computed steps to start"):
        search_schedule(Needy(), calibration, None, 2, seed=0)
    assert len(search_schedule(Needy(), calibration, None, 3, seed=0, closed=False).compute) == 3


def test_schedules_for_a_fine_reference_are_on_its_grid(quick):
    calibration = make_calibration(num_steps=4, fine_steps=STEPS, fine=True)
    found = search_schedule(Gram(), calibration, None, 3, seed=0)
    assert found.num_steps == STEPS
    with pytest.raises(InputError, match="features are recorded on the run's own steps only"):
        search_schedule(Taylor(1), calibration, None, 3, seed=0)
