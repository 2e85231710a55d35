"""The numbers of every method: what they reproduce exactly, and the papers' recursions written out, feature by feature.

Schedules are regular, irregular, and without a warm-up; features are random vectors.
"""

import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial

from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods import METHODS
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.base import Parameters
from cachec.compiler.methods.foca import FoCa
from cachec.compiler.methods.hicache import HiCache
from cachec.compiler.methods.l2p import L2p, fit_adam, fit_closed, l2p_schedule, mean_squared_error
from cachec.compiler.methods.newton import Newton
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.spectrum import Spectrum, spectrum_schedule
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable, collapse, compose
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.passes import DropAsserts, FoldStatic, Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import FEATURE, FORECAST, VELOCITY
from cachec.runtime.errors import InputError, PredictorError

SIZE = 5

SCHEDULES = {
    "interval 7 of 50": interval_schedule(50, 7),
    "interval 2 of 10": interval_schedule(10, 2),
    "l2p list": l2p_schedule(50, 8),
    "growing windows": spectrum_schedule(28),
    "irregular": Schedule(20, (0, 1, 5, 6, 8, 15, 19)),
    "no warm-up": Schedule(12, (0, 4, 5)),
    "one step": Schedule(6, (0,)),
}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def sigmas_of(num_steps, shift=3.16):
    t = np.linspace(1, 0, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def forecasts(table, features):
    """All forecasts of a table on computed features by step."""
    stacked = np.stack([features[step] for step in table.schedule.compute])
    return {s: table.coefficients[s] @ stacked + table.bias[s] for s in table.schedule.forecast}


def table_of(method, schedule):
    return method.table(schedule, sigmas_of(schedule.num_steps), None)


# What each method reproduces exactly: polynomials in the step up to a degree, from so many computed features on. For adams
# see below: its variable is sigma. Spectrum (a ridge towards zero), lesa, l2p, gram, bns and gram-hidden (fitted) reproduce
# nothing exactly.
EXACT = [
    (Reuse(), 0, 1),
    *((Newton(order), order, order + 1) for order in range(5)),
    (Taylor(0), 0, 1),
    *((Taylor(order), 1, 3) for order in range(1, 5)),
    *((HiCache(order, sigma), 0, 1) for order in range(4) for sigma in (0.5, 0.71)),
    (FoCa("anchored"), 0, 1),
    (FoCa("recursive"), 0, 1),
    (Spectrum(blend=0.0), 1, 2),
]
INEXACT = {"adams", "l2p", "lesa", "gram", "bns", "gram-hidden"}


def test_every_method_is_in_the_table_of_what_is_exact():
    assert {method.name for method, _, _ in EXACT} | INEXACT == set(METHODS)


@each_schedule
@pytest.mark.parametrize(("method", "degree", "needed"), EXACT, ids=str)
def test_methods_are_exact_on_polynomials_of_their_degree(method, degree, needed, schedule):
    curve = [Polynomial(c) for c in np.random.default_rng(degree).standard_normal((SIZE, degree + 1))]
    features = np.array([[p(step / schedule.num_steps) for p in curve] for step in range(schedule.num_steps)])
    for step, value in forecasts(table_of(method, schedule), features).items():
        if sum(computed < step for computed in schedule.compute) >= needed:
            np.testing.assert_allclose(value, features[step], atol=1e-4 if method.name == "taylor" else 1e-9)


@each_schedule
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_moves_polynomials_in_sigma_exactly_past_its_start(order, schedule):
    sigmas = sigmas_of(schedule.num_steps)
    velocity = Polynomial(np.random.default_rng(order).standard_normal(order))
    table = table_of(Adams(order), schedule)
    nodes = np.array([*sigmas[list(schedule.compute)], sigmas[-1]])
    moved = np.diff(np.concatenate([[0.0], table.coefficients @ velocity(nodes[:-1])]))
    exact = np.diff(velocity.integ()(nodes))
    np.testing.assert_allclose(moved[order - 1 :], exact[order - 1 :], atol=1e-10)


# The papers' recursions, straight through a run: `features` has the computed ones, the result the forecast ones.


def reuse(method, features, schedule):
    result, last = {}, None
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            last = features[step]
        else:
            result[step] = last
    return result


def differences_by_step(features, schedule, order):
    """TaylorSeer's state before every step: differences, and the step that they were taken at."""
    state, at = {}, None
    for step in range(schedule.num_steps):
        yield step, state, at
        if step in schedule.compute:
            updated = {0: features[step]}
            for i in range(order):
                if i not in state or not step > 3 - 2:
                    break
                updated[i + 1] = (updated[i] - state[i]) / (step - at)
            state, at = updated, step


def taylor(method, features, schedule):
    return {
        step: sum(d * (step - at) ** i / math.factorial(i) for i, d in state.items())
        for step, state, at in differences_by_step(features, schedule, method.order)
        if step not in schedule.compute
    }


def hicache(method, features, schedule):
    def polynomial(n, x):  # the physicists' recurrence
        return [1.0, 2 * x][n] if n < 2 else 2 * x * polynomial(n - 1, x) - 2 * (n - 1) * polynomial(n - 2, x)

    return {
        step: sum(d / math.factorial(i) * method.sigma**i * polynomial(i, method.sigma * (step - at)) for i, d in state.items())
        for step, state, at in differences_by_step(features, schedule, method.order)
        if step not in schedule.compute
    }


def newton(method, features, schedule):
    """Divided differences, the triangle and Horner's rule."""
    result, history = {}, deque(maxlen=method.order + 1)
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.appendleft((step, features[step]))
            continue
        nodes, column = [s for s, _ in history], [f for _, f in history]
        heads = [column[0]]
        for level in range(1, len(nodes)):
            column = [(column[j] - column[j + 1]) / (nodes[j] - nodes[j + level]) for j in range(len(column) - 1)]
            heads.append(column[0])
        value = heads[-1]
        for level in range(len(heads) - 2, -1, -1):
            value = heads[level] + (step - nodes[level]) * value
        result[step] = value
    return result


def foca(method, features, schedule):
    result, values, anchors, at = {}, deque(maxlen=2), deque(maxlen=2), None
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            values.append(features[step])
            anchors.append(features[step])
            at = step
            continue
        if len(anchors) < 2:
            value = anchors[-1]
        elif method.form == "recursive":  # cache-dit's lines: a BDF2 predictor, then its Heun corrector
            predicted = 2.0 * values[1] - values[0]
            value = predicted + 0.5 * ((anchors[1] - anchors[0]) - (values[1] - values[0]))
        else:
            elapsed = step - at
            reach = min(elapsed, 3)
            value = anchors[1] + (reach / 2) * ((anchors[1] - anchors[0]) + (values[1] - values[0]))
            if elapsed > 3:
                value = (3 / elapsed) * value + (1 - 3 / elapsed) * anchors[1]
        result[step] = value
        values.append(value)
    return result


def spectrum(method, features, schedule):
    """Coefficients of every element by ridge regression (as least squares with extra rows), then the value."""
    result, history = {}, []
    half = schedule.num_steps / 2
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.append((step, features[step]))
            continue
        design = np.array([[Chebyshev.basis(n)((s - half) / half) for n in range(method.degree + 1)] for s, _ in history])
        extra = math.sqrt(method.ridge) * np.eye(method.degree + 1)
        known = np.concatenate([[f for _, f in history], np.zeros((method.degree + 1, SIZE))])
        coefficients = np.linalg.lstsq(np.concatenate([design, extra]), known, rcond=None)[0]
        fitted = np.array([Chebyshev(column)((step - half) / half) for column in coefficients.T])
        s, linear = history[-1]
        if len(history) > 1:
            linear = linear + (step - s) * (linear - history[-2][1]) / (s - history[-2][0])
        result[step] = method.blend * fitted + (1 - method.blend) * linear
    return result


RECURSIONS = [
    (Reuse(), reuse),
    *((Taylor(order), taylor) for order in range(5)),
    *((Newton(order), newton) for order in range(5)),
    *((HiCache(order, sigma), hicache) for order in range(4) for sigma in (0.5, 0.71)),
    (FoCa("anchored"), foca),
    (FoCa("recursive"), foca),
    *((Spectrum(degree, ridge, blend), spectrum) for degree, ridge, blend in [(4, 0.1, 1.0), (4, 0.1, 0.5), (2, 1e-3, 0.0)]),
]


@each_schedule
@pytest.mark.parametrize(("method", "recursion"), RECURSIONS, ids=lambda value: str(value) if not callable(value) else "")
def test_tables_equal_the_recursion_written_out(method, recursion, schedule):
    features = np.random.default_rng(0).standard_normal((schedule.num_steps, SIZE))
    got = forecasts(table_of(method, schedule), features)
    expected = recursion(method, features, schedule)
    assert set(got) == set(expected)
    for step, value in expected.items():
        np.testing.assert_allclose(got[step], value, rtol=1e-6 if method.name != "taylor" else 1e-4, atol=1e-4)


@each_schedule
@pytest.mark.parametrize("method", [method for method, _ in RECURSIONS], ids=str)
def test_forecasts_use_only_what_is_computed_before_them(method, schedule):
    table = table_of(method, schedule)
    assert isinstance(table, ForecastTable)
    assert table.coefficients.dtype == np.float64
    assert (table.coefficients[list(schedule.compute)] == 0).all()
    for step in schedule.forecast:
        assert (table.coefficients[step, np.array(schedule.compute) > step] == 0).all()


def sampled(schedule, sigmas, velocity_of, velocities):
    """Euler through all steps, the forecast ones with ``velocity_of(step, all earlier velocities)``; latents when computing."""
    x, used, latents = np.zeros(SIZE), [], []
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            latents.append(x)
            used.append(velocities[step])
        else:
            used.append(velocity_of(step, used))
        x = x + (sigmas[step + 1] - sigmas[step]) * used[-1]
    return [*latents[1:], x]


@each_schedule
def test_l2p_equals_the_run_with_forecasts_fed_back(schedule):
    num, rng = schedule.num_steps, np.random.default_rng(0)
    weights = np.tril(rng.standard_normal((num, num)), -1) / num
    parameters = Parameters({"weights": torch.from_numpy(weights)}, {}, "a test")
    sigmas, velocities = sigmas_of(num), rng.standard_normal((num, SIZE))
    table = L2p().table(schedule, sigmas, parameters)
    assert isinstance(table, AdvanceTable)
    expected = sampled(schedule, sigmas, lambda step, used: weights[step, :step] @ np.array(used), velocities)
    got = table.coefficients @ velocities[list(schedule.compute)]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert (np.triu(table.coefficients, 1) == 0).all()


@each_schedule
def test_adams_equals_the_run_with_the_polynomial_forecast_in_between(schedule):
    """Integrating the polynomial over a gap is what infinitely fine steps with its values would do."""
    sigmas, order = sigmas_of(schedule.num_steps), 2
    velocities = np.random.default_rng(0).standard_normal((schedule.num_steps, SIZE))
    nodes, x, expected = deque(maxlen=order), np.zeros(SIZE), []
    for step, end in zip(schedule.compute, [*schedule.compute[1:], schedule.num_steps], strict=True):
        nodes.append(step)
        a, b = sigmas[step], sigmas[end]
        if len(nodes) == 1:
            x = x + (b - a) * velocities[step]
        else:
            slope = (velocities[step] - velocities[nodes[0]]) / (sigmas[step] - sigmas[nodes[0]])
            x = x + (b - a) * velocities[step] + (b - a) ** 2 / 2 * slope
        expected.append(x)
    got = table_of(Adams(order), schedule).coefficients @ velocities[list(schedule.compute)]
    np.testing.assert_allclose(got, expected, atol=1e-12)


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


@each_schedule
def test_reuse_of_velocities_is_euler_on_the_computed_steps(schedule):
    sigmas = sigmas_of(schedule.num_steps)
    got = collapse(table_of(Reuse(), schedule), sigmas)
    np.testing.assert_allclose(got.coefficients, table_of(Adams(1), schedule).coefficients, atol=1e-12)


def folded_table(method, schedule):
    """The table as the passes find it: the predictor captured, folded, and composed."""
    num = schedule.num_steps
    graph = capture_predictor(method.predictor(None), method.window, torch.randn(2, 3, 4), num)
    result = next(iter(reversed(graph.graph.nodes)))
    result.args = ({VELOCITY: outputs(graph)[FEATURE], FEATURE: outputs(graph)[FEATURE]},)
    graph.recompile()
    graphs = DropAsserts().run(Graphs({FORECAST: graph})).graphs
    rows = FoldStatic(torch.from_numpy(sigmas_of(num)).float(), method.histories(schedule)).run(graphs).graphs.rows
    return compose(rows.coefficients.numpy(), rows.bias.numpy(), schedule, feeds_back=method.feeds_back)


@pytest.mark.parametrize("schedule", [SCHEDULES["interval 7 of 50"], SCHEDULES["irregular"]], ids=["interval", "irregular"])
@pytest.mark.parametrize("method", [Reuse(), Taylor(0), Taylor(1), Taylor(3)], ids=str)
def test_a_predictors_own_table_is_the_folded_one(method, schedule):
    own, folded = table_of(method, schedule), folded_table(method, schedule)
    np.testing.assert_allclose(own.coefficients, folded.coefficients, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.bias, folded.bias, atol=1e-6)


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
    assert parameters.tensors["weights"].dtype == torch.float64
    assert method.table(schedule, sigmas_of(12), parameters).coefficients.shape == (4, 4)


def test_l2p_without_weights_or_with_foreign_ones_is_refused():
    schedule, sigmas = Schedule(6, (0, 1)), sigmas_of(6)
    with pytest.raises(PredictorError, match="needs fitted weights"):
        L2p().table(schedule, sigmas, None)
    with pytest.raises(PredictorError, match=r"holds weights \[5, 5\], but the schedule has 6 steps"):
        L2p().table(schedule, sigmas, Parameters({"weights": torch.zeros(5, 5)}, {}, "a file"))
    with pytest.raises(PredictorError, match="a file does not hold L2P weights"):
        L2p().table(schedule, sigmas, Parameters({"x": torch.zeros(5)}, {}, "a file"))


def test_methods_have_their_published_schedules():
    assert Spectrum().interval(50, 6).compute == (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)
    assert Spectrum().interval(50, 4) == spectrum_schedule(50)
    assert L2p().interval(50, 7).compute == (0, 1, 2, 4, 9, 17, 26, 35, 43)
    assert L2p().interval(28, 7) == interval_schedule(28, 7)
    assert HiCache().interval(50, 7) == interval_schedule(50, 7)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Newton, {"order": "9"}, "order is 9; newton takes 0 to 8"),
        (Newton, {"order": "-1"}, "order is -1"),
        (HiCache, {"order": "9"}, "order is 9; hicache"),
        (HiCache, {"sigma": "0"}, "sigma is 0.0; hicache takes more than 0"),
        (HiCache, {"sigma": "1.5"}, "sigma is 1.5"),
        (HiCache, {"sigma": "nan"}, "must be finite"),
        (FoCa, {"form": "heun"}, "form is 'heun'; foca takes anchored or recursive"),
        (Spectrum, {"degree": "17"}, "degree is 17"),
        (Spectrum, {"ridge": "0"}, "ridge is 0.0; spectrum takes more than 0"),
        (Spectrum, {"blend": "1.1"}, "blend is 1.1"),
        (Adams, {"order": "0"}, "order is 0; adams takes 1 to 4"),
        (Adams, {"order": "5"}, "order is 5"),
        (L2p, {"fit": "sgd"}, "fit is 'sgd'; l2p takes closed or adam"),
        (L2p, {"ridge": "-1"}, "ridge is -1.0; it must not be negative"),
        (L2p, {"order": "1"}, "unknown option of method 'l2p'"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method.with_options(options)
