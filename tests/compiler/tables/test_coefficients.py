"""Composing forecasts of forecasts, and collapsing whole gaps to rows."""

import numpy as np
import pytest
from toy_tables import SCHEDULES, SIZE, sampled, sigmas_of

from cachec.compiler.tables.coefficients import collapse, compose
from cachec.runtime.errors import PredictorError

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@each_schedule
@pytest.mark.parametrize("feeds_back", [True, False])
def test_composed_forecasts_are_those_made_one_from_another(schedule, feeds_back):
    rng, num = np.random.default_rng(0), schedule.num_steps
    rows, bias, features = rng.standard_normal((num, 3)) / 2, rng.standard_normal(num), rng.standard_normal((num, SIZE))
    table, known = compose(rows, bias, schedule, feeds_back=feeds_back), {}
    computed = features[list(schedule.compute)]
    for step in range(num):
        known[step] = features[step]
        if step in schedule.forecast:
            history = schedule.history(step, 3, feeds_back=feeds_back)
            known[step] = rows[step] @ np.array([known[past] for past in history]) + bias[step]
            np.testing.assert_allclose(table.rows[step] @ computed + table.bias[step], known[step], atol=1e-9)
    assert not table.coefficients[list(schedule.compute)].any()
    assert not table.bias[list(schedule.compute)].any()


@each_schedule
def test_collapse_equals_euler_step_by_step(schedule):
    rng, num = np.random.default_rng(0), schedule.num_steps
    rows, sigmas, velocities = rng.standard_normal((num, 3)) / 2, sigmas_of(num), rng.standard_normal((num, SIZE))
    table = collapse(compose(rows, np.zeros(num), schedule, feeds_back=True), sigmas)

    def velocity_of(step, used):
        newest = [used[max(step - 1 - m, 0)] for m in range(3)]
        return rows[step] @ np.array(newest)

    expected = sampled(schedule, sigmas, velocity_of, velocities)
    np.testing.assert_allclose(table.coefficients @ velocities[list(schedule.compute)], expected, atol=1e-9)


def test_a_bias_cannot_be_collapsed():
    schedule = SCHEDULES["irregular"]
    table = compose(np.zeros((20, 1)), np.ones(20), schedule, feeds_back=False)
    with pytest.raises(PredictorError, match="a forecast of velocities with a bias cannot be collapsed"):
        collapse(table, sigmas_of(20))
