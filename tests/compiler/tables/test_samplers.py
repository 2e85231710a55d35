"""Solver tables against the solvers themselves, run on a model that is not linear."""

import numpy as np
import pytest
import torch

from cachec.compiler.tables.samplers import SOLVERS, diffusers_scheduler, solver_rows
from cachec.runtime.errors import InputError, PredictorError

SHAPE = (2, 3, 4)


def uniform(num):
    return np.linspace(1, 0, num + 1)


def shifted(num, shift=3.16):
    t = np.linspace(1, 0, num + 1)
    return shift * t / (1 + (shift - 1) * t)


def jumpy(num):
    """A noise level below 1 to start from, and steps of very different sizes."""
    steps = np.random.default_rng(num).uniform(0.2, 3, num)
    return 0.97 * (1 - np.concatenate([[0], np.cumsum(steps)]) / steps.sum()).clip(0) * np.r_[np.ones(num), 0]


GRIDS = {"uniform": uniform, "shifted": shifted, "jumpy": jumpy}


def model(x, sigma):
    return np.tanh(x) + sigma


def run_rows(rows, sigmas, noise):
    x, velocities = noise, []
    for i, sigma in enumerate(sigmas[:-1]):
        velocities.append(model(x, sigma))
        x = noise + sum(w * v for w, v in zip(rows[i, : i + 1], velocities, strict=True))
    return x


def lagrange_weight(nodes, j, a, b):
    """Integral of the j-th Lagrange polynomial of ``nodes`` over [a, b]."""
    others = np.delete(nodes, j)
    antiderivative = np.poly1d(np.poly(others) / np.prod(nodes[j] - others)).integ()
    return antiderivative(b) - antiderivative(a)


def run_adams(order, sigmas, noise):
    x, velocities = noise, []
    for i, sigma in enumerate(sigmas[:-1]):
        velocities.append(model(x, sigma))
        used = range(max(0, i + 1 - order), i + 1)
        nodes = np.array([sigmas[j] for j in used])
        x = x + sum(lagrange_weight(nodes, n, sigma, sigmas[i + 1]) * velocities[j] for n, j in enumerate(used))
    return x


def run_diffusers(name, sigmas, noise):
    scheduler, x = diffusers_scheduler(name, sigmas), torch.from_numpy(noise)
    for timestep, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        velocity = torch.from_numpy(model(x.numpy(), sigma))
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_rows_equal_the_solver_on_a_nonlinear_model(name, grid):
    orders = {"euler": 1, "ab2": 2, "ab3": 3}
    for num in (1, 2, 3, 9):
        sigmas, noise = grid(num), np.random.default_rng(num).standard_normal(SHAPE)
        expected = run_adams(orders[name], sigmas, noise) if name in orders else run_diffusers(name, sigmas, noise)
        rows = solver_rows(name, sigmas)
        assert rows.dtype == np.float64
        assert rows.shape == (num, num)
        assert (np.triu(rows, 1) == 0).all()
        np.testing.assert_allclose(run_rows(rows, sigmas, noise), expected, rtol=0, atol=1e-6 if name == "dpm" else 1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_constant_velocity_is_followed_exactly(name):
    for num in (1, 2, 5, 20):
        sigmas = shifted(num)
        np.testing.assert_allclose(solver_rows(name, sigmas).sum(axis=1), sigmas[1:] - sigmas[0], atol=2e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("ab3", 3)])
def test_adams_is_exact_on_polynomials_in_sigma_past_its_start(name, order, grid):
    sigmas = GRIDS[grid](8)
    velocity = np.poly1d(np.random.default_rng(order).standard_normal(order))  # degree order - 1
    positions = np.concatenate([[0.0], solver_rows(name, sigmas) @ velocity(sigmas[:-1])])
    exact = velocity.integ()(sigmas)
    np.testing.assert_allclose(np.diff(positions)[order - 1 :], np.diff(exact)[order - 1 :], atol=1e-12)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("ab3", 2)])
def test_adams_has_its_order(name, order):
    """dx / dsigma = -x: halving the steps divides the error by 2^order; the Euler step at the start limits it to 2."""
    errors = []
    for num in (40, 80):
        sigmas, x, velocities = np.linspace(1, 0, num + 1), 1.0, []
        rows = solver_rows(name, sigmas)
        for i in range(num):
            velocities.append(-x)
            x = 1.0 + rows[i, : i + 1] @ velocities
        errors.append(abs(x - np.e))
    assert errors[0] / errors[1] > 2 ** (order - 0.5)


def test_diffusers_own_sigmas_give_the_same_unipc():
    """``set_timesteps(sigmas=…)`` at shift 1 is the published way in; it rounds to float32."""
    from diffusers import UniPCMultistepScheduler

    sigmas, noise = shifted(6), np.random.default_rng(0).standard_normal(SHAPE)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=sigmas[:-1].copy())
    x = torch.from_numpy(noise)
    for timestep, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        x = scheduler.step(torch.from_numpy(model(x.numpy(), sigma)), timestep, x, return_dict=False)[0]
    np.testing.assert_allclose(run_rows(solver_rows("unipc", sigmas), sigmas, noise), x.numpy(), atol=1e-4)


def test_unknown_solvers_are_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="Did you mean 'euler'"):
        solver_rows("eular", uniform(3))


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.5], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [1.2, 0.5, 0.0]])
def test_noise_levels_that_do_not_fall_to_zero_are_refused(sigmas):
    with pytest.raises(InputError, match="must fall"):
        solver_rows("euler", np.array(sigmas))


def test_a_solver_that_scales_the_noise_is_refused(monkeypatch):
    import diffusers

    real = diffusers.UniPCMultistepScheduler.step
    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "step", lambda *given, **options: (2 * real(*given, **options)[0],))
    with pytest.raises(PredictorError, match="diffusers' unipc does not keep the noise's share at 1"):
        solver_rows("unipc", uniform(4))
