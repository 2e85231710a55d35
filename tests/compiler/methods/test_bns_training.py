"""Training rows by gradients: where it begins, that it helps, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
from toy_calibration import make_calibration

from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.bns_training import train_rows
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.samplers import adams_bashforth
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

STEPS = 12
FOUR = Schedule(STEPS, (0, 2, 5, 8))


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


def loss_of(calibration, rows):
    return -decibels(calibration.errors(AdvanceTable(FOUR, rows)))


def test_training_lowers_the_loss(calibration):
    start = adams_bashforth(calibration.sigmas[[*FOUR.compute, STEPS]], 2)
    rows = train_rows(calibration, FOUR, updates=40, batch=6, rate=5e-3)
    assert rows.shape == (4, 4)
    assert rows.dtype == np.float64
    assert (np.triu(rows, 1) == 0).all()
    assert loss_of(calibration, rows) < loss_of(calibration, start) - 3


def test_training_starts_from_adams_bashforth(calibration):
    rows = train_rows(calibration, FOUR, updates=1, batch=6, rate=1e-9)
    np.testing.assert_allclose(rows, adams_bashforth(calibration.sigmas[[*FOUR.compute, STEPS]], 2), atol=1e-6)


def test_training_is_deterministic_from_its_seed(calibration):
    one, same, other = (train_rows(calibration, FOUR, updates=5, batch=2, rate=5e-3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-6)


def test_training_leaves_no_gradients_on_the_model(calibration):
    train_rows(calibration, FOUR, updates=1, batch=2, rate=5e-3)
    assert all(p.grad is None for p in calibration.evaluator._compute.parameters())


def test_a_loss_that_is_not_finite_says_so(calibration):
    broken = replace(calibration, conditions={"prompt": np.full_like(calibration.conditions["prompt"], np.nan)})
    with pytest.raises(InputError, match=r"bns: the loss is not finite at update 0: lower --set rate \(0.005\)"):
        train_rows(broken, FOUR, updates=5, batch=2, rate=5e-3)
