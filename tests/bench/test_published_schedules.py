"""Searched schedules against trying every one."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from cachec.runtime.errors import InputError

published = pytest.importorskip("bench.published_schedules", reason="the source tree is not beside the tests")
cem_schedule, lemica_schedule, reuse_errors = published.cem_schedule, published.lemica_schedule, published.reuse_errors

NUM_PROMPTS, SIZE = 3, 7


def velocities(num, seed=0):
    """Smooth random curves [P, T, N], faster towards the ends."""
    rng = np.random.default_rng(seed)
    t = np.linspace(-1, 1, num)[None, :, None]
    return sum(rng.standard_normal((NUM_PROMPTS, 1, SIZE)) * t**power for power in range(6))


def gram_of(v):
    return np.einsum("pin,pjn->pij", v, v)


def sigmas_of(num, shift=3.16):
    t = np.linspace(1, 0, num + 1)
    return shift * t / (1 + (shift - 1) * t)


def cem_cost(v, steps, power):
    """The released code's sum, written out."""
    total = 0.0
    for a, b in pairwise(steps):
        skipped = b - a - 1
        for s in range(skipped, b + 1) if skipped else ():
            x, y = v[:, s - skipped], v[:, s]
            cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            total += (1 - cosines).mean() * skipped**power
    return total


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize(("num", "budget"), [(2, 2), (6, 3), (9, 4), (9, 9), (10, 2), (10, 6)])
def test_cem_finds_the_cheapest_schedule(num, budget, power):
    v = velocities(num, seed=budget)
    got = cem_schedule(gram_of(v), budget, power=power)
    every = [(0, *middle, num - 1) for middle in combinations(range(1, num - 1), budget - 2)]
    assert got.compute in every
    assert cem_cost(v, got.compute, power) == pytest.approx(min(cem_cost(v, steps, power) for steps in every))


def test_cem_keeps_gaps_within_the_spread():
    got = cem_schedule(gram_of(velocities(50)), 10, spread=1)
    assert {b - a for a, b in pairwise(got.compute)} <= {4, 5, 6}
    with pytest.raises(InputError, match="widen the spread"):
        cem_schedule(gram_of(velocities(50)), 9, spread=0)


@pytest.mark.parametrize(("num", "budget"), [(1, 1), (6, 1), (6, 3), (9, 4), (9, 9), (11, 5)])
def test_lemica_finds_the_lexicographically_least_schedule(num, budget):
    v, sigmas = velocities(num, seed=budget), sigmas_of(num)

    def edge(i, j):
        missed = sum((sigmas[s + 1] - sigmas[s]) * (v[:, i] - v[:, s]) for s in range(i, j))
        return np.linalg.norm(missed, axis=-1).mean()

    def falling(steps):
        return sorted((edge(i, j) for i, j in pairwise((*steps, num))), reverse=True)

    every = [(0, *rest) for rest in combinations(range(1, num), budget - 1)]
    got = lemica_schedule(gram_of(v), sigmas, budget)
    assert got.compute in every
    np.testing.assert_allclose(falling(got.compute), min(falling(steps) for steps in every), atol=1e-6)


def test_reuse_errors_are_zero_for_one_step_and_infinite_backwards():
    edges = reuse_errors(gram_of(velocities(8)), sigmas_of(8))
    assert (np.diagonal(edges, 1) == 0).all()
    assert np.isinf(np.tril(edges)[np.tril_indices(8)]).all()


def test_lemica_computes_more_where_velocities_turn():
    """Still velocities up to step 20, moving ones after: the steps go there."""
    v = np.concatenate([np.ones((1, 20, SIZE)), 1 + np.cumsum(np.random.default_rng(0).standard_normal((1, 10, SIZE)), 1)], 1)
    assert sum(step < 20 for step in lemica_schedule(gram_of(v), sigmas_of(30), 8).compute) <= 2


@pytest.mark.parametrize("budget", [0, 11])
def test_budgets_out_of_range_are_refused(budget):
    gram = gram_of(velocities(10))
    for search in (lambda: cem_schedule(gram, budget), lambda: lemica_schedule(gram, sigmas_of(10), budget)):
        with pytest.raises(InputError, match=f"budget is {budget}"):
            search()


def test_cem_with_a_single_step_and_foreign_noise_levels_are_refused():
    gram = gram_of(velocities(10))
    with pytest.raises(InputError, match="2 or more"):
        cem_schedule(gram, 1)
    with pytest.raises(InputError, match="noise levels"):
        lemica_schedule(gram, sigmas_of(9), 3)
