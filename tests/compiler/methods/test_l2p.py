"""Fits of L2P against the published loss on the velocities themselves, and its table against the run that feeds back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_tables import SCHEDULES, SIZE, sampled, sigmas_of

from cachec.compiler.methods.l2p import L2p, fit_adam, fit_closed, l2p_schedule, mean_squared_error
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError, PredictorError


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_table_is_the_run_with_forecasts_fed_back(schedule):
    num, rng = schedule.num_steps, np.random.default_rng(0)
    weights = np.tril(rng.standard_normal((num, num)), -1) / num
    parameters = Parameters({"weights": weights}, {}, "a test")
    sigmas, velocities = sigmas_of(num), rng.standard_normal((num, SIZE))
    table = L2p().table(schedule, sigmas, parameters)
    assert isinstance(table, AdvanceTable)
    expected = sampled(schedule, sigmas, lambda step, used: weights[step, :step] @ np.array(used), velocities)
    got = table.coefficients @ velocities[list(schedule.compute)]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert (np.triu(table.coefficients, 1) == 0).all()


def recorded_velocities(num_prompts=4, num_steps=12, size=40):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, num_steps)[None, :, None]
    smooth = sum(rng.standard_normal((num_prompts, 1, size)) * t**power for power in range(4))
    return smooth + 0.05 * rng.standard_normal((num_prompts, num_steps, size))


def squared_error(weights, velocities):
    """The published loss on the velocities themselves."""
    forecast = np.einsum("tj,pjn->ptn", weights, velocities)[:, 1:]
    return ((forecast - velocities[:, 1:]) ** 2).mean()


@pytest.fixture
def runs():
    velocities = recorded_velocities()
    return velocities, np.einsum("pin,pjn->pij", velocities, velocities), velocities.shape[-1]


def test_the_grams_loss_is_that_of_the_velocities(runs):
    velocities, gram, size = runs
    weights = np.tril(np.random.default_rng(1).standard_normal((12, 12)), -1)
    assert mean_squared_error(weights, gram, size) == pytest.approx(squared_error(weights, velocities))


def test_the_closed_fit_is_where_the_gradient_is_zero(runs):
    velocities, gram, _ = runs
    weights = torch.from_numpy(fit_closed(gram, 0.0)).requires_grad_()
    v = torch.from_numpy(velocities)
    ((torch.tril(weights, -1) @ v - v)[:, 1:] ** 2).mean().backward()
    assert torch.tril(weights.grad, -1).abs().max() < 1e-10
    assert (np.triu(weights.detach().numpy()) == 0).all()


def test_a_ridge_adds_its_share_of_the_mean_square(runs):
    _, gram, _ = runs
    pooled, weights = gram.sum(0), fit_closed(gram, 0.1)
    penalty = 0.1 * np.diagonal(pooled).mean()
    for step in range(1, 12):
        gradient = pooled[:step, :step] @ weights[step, :step] - pooled[:step, step] + penalty * weights[step, :step]
        assert np.abs(gradient).max() < 1e-8


def test_adam_on_the_gram_is_adam_on_the_velocities(runs):
    """The released training loop, on the recorded velocities."""
    velocities, gram, size = runs
    v = torch.from_numpy(velocities)
    weights = torch.eye(12, dtype=torch.float64).requires_grad_()  # there, row t forecasts step t + 1
    mask = torch.ones(12, 12).tril().double()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(201):
        optimizer.zero_grad()
        (torch.matmul(weights * mask, v)[:, :-1] - v[:, 1:]).pow(2).mean().backward()
        optimizer.step()
    np.testing.assert_allclose(fit_adam(gram, size)[1:], (weights * mask).detach().numpy()[:-1], atol=1e-6)


def test_adam_descends_towards_the_closed_fit(runs):
    _, gram, size = runs
    start, least = np.eye(12, k=-1), mean_squared_error(fit_closed(gram, 0.0), gram, size)
    losses = [
        mean_squared_error(weights, gram, size) for weights in (start, *(fit_adam(gram, size, n) for n in (50, 201, 3000)))
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] - least < 0.05 * (losses[0] - least)
    assert losses[-1] >= least


@pytest.mark.parametrize("fit", ["closed", "adam"])
def test_l2p_calibrates_from_a_gram(runs, fit):
    _, gram, size = runs
    calibration = SimpleNamespace(velocity_gram=lambda: gram, num_elements=size, origin="four runs")
    schedule = Schedule(12, (0, 1, 2, 6))
    method = L2p(fit=fit)
    parameters = method.calibrate(calibration, schedule)
    assert parameters.origin == "four runs"
    assert parameters.facts["fit"] == fit
    assert parameters.arrays["weights"].dtype == np.float64
    assert method.table(schedule, sigmas_of(12), parameters).coefficients.shape == (4, 4)


def test_l2p_without_weights_or_with_foreign_ones_is_refused():
    schedule, sigmas = Schedule(6, (0, 1)), sigmas_of(6)
    with pytest.raises(PredictorError, match="needs fitted weights"):
        L2p().table(schedule, sigmas, None)
    with pytest.raises(PredictorError, match=r"holds weights \[5, 5\], but the schedule has 6 steps"):
        L2p().table(schedule, sigmas, Parameters({"weights": np.zeros((5, 5))}, {}, "a file"))
    with pytest.raises(PredictorError, match="a file does not hold L2P weights"):
        L2p().table(schedule, sigmas, Parameters({"x": np.zeros(5)}, {}, "a file"))


@pytest.mark.parametrize(
    ("budget", "last"),
    [(11, (30, 37, 44)), (10, (31, 38, 45)), (9, (26, 35, 43)), (8, (20, 31, 41)), (7, (12, 24, 38)), (6, (4, 16, 32))],
)
def test_l2p_lists_have_their_budget(budget, last):
    schedule = l2p_schedule(50, budget)
    assert len(schedule.compute) == budget
    assert schedule.compute[:3] + schedule.compute[-3:] == (0, 1, 2, *last)


@pytest.mark.parametrize(("num_steps", "budget"), [(50, 5), (50, 12), (28, 8)])
def test_l2p_without_a_list_is_refused_with_what_there_is(num_steps, budget):
    with pytest.raises(InputError, match="50 steps, with 6, 7, 8, 9, 10, 11 of them"):
        l2p_schedule(num_steps, budget)


def test_its_schedule_is_the_list_where_there_is_one():
    assert L2p().interval(50, 7).compute == (0, 1, 2, 4, 9, 17, 26, 35, 43)
    assert L2p().interval(28, 7) == interval_schedule(28, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fit": "sgd"}, "fit is 'sgd'; l2p takes closed or adam"), ({"ridge": -1.0}, "ridge is -1.0; it must not be negative")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        L2p(**options)
