"""Fits on latents that the rows themselves led to, against straight-line lstsq, autograd, and what must hold by design."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_calibration import CHANNELS, TOKENS, make_calibration, raw_runs

import cachec.compiler.methods.gram_fit as module
from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.base import Parameters
from cachec.compiler.methods.bns import Bns
from cachec.compiler.methods.bns_training import train_rows
from cachec.compiler.methods.gram import Gram, schedule_facts
from cachec.compiler.methods.gram_fit import RIDGES, fit_rows, node_timesteps, polish, solve_row
from cachec.compiler.methods.gram_hidden import GramHidden
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.samplers import adams_bashforth
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

STEPS = 12
SCHEDULES = {
    "four": Schedule(STEPS, (0, 2, 5, 8)),
    "late": Schedule(STEPS, (0, 10, 11)),
    "two": Schedule(STEPS, (0, 1)),
    "one": Schedule(STEPS, (0,)),
}
FOUR = SCHEDULES["four"]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


@pytest.fixture
def no_ridge(monkeypatch):
    monkeypatch.setattr(module, "RIDGES", (0.0,))


def ends_of(schedule):
    return [*schedule.compute[1:], schedule.num_steps]


def lstsq_rows(calibration, schedule, *, fine=False):
    """The fit written out: run to a node, regress the displacement there on all velocities so far, go on from there."""
    statistics, denoiser = calibration.statistics, calibration.denoiser
    noise, prompt = statistics.noise[calibration.index], calibration.conditions["prompt"][calibration.index]
    reference = (statistics.fine_latents if fine else statistics.latents)[calibration.index]
    x, velocities, rows = noise, [], np.zeros((len(schedule.compute), len(schedule.compute)))
    for i, (step, end) in enumerate(zip(schedule.compute, ends_of(schedule), strict=True)):
        velocities.append(denoiser.compute(x, step, {"prompt": prompt})[0])
        design = torch.stack(velocities).flatten(1).numpy().T
        target = (reference[:, end - 1] - noise).flatten().numpy()
        rows[i, : i + 1] = np.linalg.lstsq(design, target, rcond=None)[0]
        x = noise + sum(float(c) * v for c, v in zip(rows[i], velocities, strict=False))
    return rows, x


@each_schedule
def test_rows_equal_lstsq_node_by_node(calibration, schedule, no_ridge):
    table = fit_rows(calibration, schedule)
    rows, final = lstsq_rows(calibration, schedule)
    assert isinstance(table, AdvanceTable)
    assert (table.schedule, table.timesteps) == (schedule, None)
    np.testing.assert_allclose(table.coefficients, rows, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(calibration.run(table), final, rtol=1e-8, atol=1e-8)


def test_a_ridge_chosen_over_prompts_changes_little_where_data_is_good(calibration):
    rows, _ = lstsq_rows(calibration, FOUR)
    np.testing.assert_allclose(fit_rows(calibration, FOUR).coefficients, rows, rtol=0.05, atol=0.02)


def test_with_a_fine_reference_rows_lead_to_it(no_ridge):
    calibration = make_calibration(num_steps=4, fine_steps=STEPS, fine=True)
    assert calibration.num_steps == STEPS
    rows, final = lstsq_rows(calibration, FOUR, fine=True)
    table = fit_rows(calibration, FOUR)
    np.testing.assert_allclose(table.coefficients, rows, rtol=1e-6, atol=1e-8)
    expected = (final - calibration.statistics.fine_latents[:, -1]).flatten(1).norm(dim=1)
    np.testing.assert_allclose(
        calibration.errors(table), expected / calibration.statistics.fine_latents[:, -1].flatten(1).norm(dim=1), rtol=1e-6
    )


def test_every_step_computed_is_the_reference(calibration):
    table = fit_rows(calibration, Schedule(STEPS, tuple(range(STEPS))))
    assert calibration.errors(table).max() < 1e-7
    euler = np.tril(np.broadcast_to(np.diff(calibration.sigmas), (STEPS, STEPS)))
    np.testing.assert_allclose(table.coefficients[:3], euler[:3], atol=1e-5)


@each_schedule
def test_velocities_that_do_not_change_need_one_step(schedule):
    calibration = make_calibration(num_steps=STEPS, curved=False)
    table = fit_rows(calibration, schedule)
    assert calibration.errors(table).max() < 1e-9
    moved = calibration.sigmas[ends_of(schedule)] - calibration.sigmas[0]
    np.testing.assert_allclose(table.coefficients.sum(axis=1), moved, rtol=1e-8)


def test_one_prompt_is_enough_and_many_are_run_in_batches():
    one, many = make_calibration(1), make_calibration(37)
    assert one.errors(fit_rows(one, FOUR)).max() < 0.05
    table = fit_rows(many, FOUR)
    alone = np.concatenate([many.select([i]).errors(table) for i in range(37)])
    np.testing.assert_allclose(many.errors(table), alone, rtol=1e-6)


def test_a_run_that_is_not_finite_names_the_prompt_and_the_step(calibration):
    prompt = calibration.conditions["prompt"].clone()
    prompt[3] = torch.nan
    with pytest.raises(InputError, match=r"step 0 for prompt 4 \('prompt 3'\)"):
        fit_rows(replace(calibration, conditions={"prompt": prompt}), FOUR)


def regression(noisy, num_prompts=8, size=5, n=4):
    """Regressors [P, n, E] and a target [P, E] that they give, or know nothing of."""
    generator = np.random.default_rng(0)
    regressors = generator.standard_normal((num_prompts, n, size))
    target = generator.standard_normal((num_prompts, size)) if noisy else np.einsum("n,pne->pe", [1.0, -2, 0.5, 3], regressors)
    return regressors, target


def products_of(regressors, target):
    return (
        np.einsum("pne,pme->pnm", regressors, regressors),
        np.einsum("pne,pe->pn", regressors, target),
        np.einsum("pe,pe->p", target, target),
    )


def ridge_lstsq(regressors, target, ridge):
    """Ridge regression as least squares with extra equations."""
    design = np.concatenate([rows.T for rows in regressors])
    penalty = ridge * (design**2).sum() / design.shape[1]
    extra = np.sqrt(penalty) * np.eye(design.shape[1])
    known = np.concatenate([target.reshape(-1), np.zeros(design.shape[1])])
    return np.linalg.lstsq(np.concatenate([design, extra]), known, rcond=None)[0]


def chosen_ridge(regressors, target):
    row = solve_row(*products_of(regressors, target))
    distances = [np.abs(row - ridge_lstsq(regressors, target, ridge)).max() for ridge in RIDGES]
    assert min(distances) < 1e-9
    return RIDGES[int(np.argmin(distances))]


def held_out_error(regressors, target, ridge, folds):
    error = 0.0
    for fold in range(folds):
        out = np.arange(len(target)) % folds == fold
        row = ridge_lstsq(regressors[~out], target[~out], ridge)
        error += ((np.einsum("n,pne->pe", row, regressors[out]) - target[out]) ** 2).sum()
    return error


def test_regressors_of_noise_get_a_larger_ridge():
    assert chosen_ridge(*regression(noisy=True)) == max(RIDGES)
    assert chosen_ridge(*regression(noisy=False)) < 1e-9


@pytest.mark.parametrize("num_prompts", [2, 5, 8, 11])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 1.0])
def test_the_ridge_is_the_one_with_the_least_held_out_error(num_prompts, share):
    regressors, target = regression(noisy=False, num_prompts=num_prompts)
    target = target + 10 * share * regression(noisy=True, num_prompts=num_prompts)[1]
    errors = [held_out_error(regressors, target, ridge, min(8, num_prompts)) for ridge in RIDGES]
    row = solve_row(*products_of(regressors, target))
    chosen = int(np.argmin([np.abs(row - ridge_lstsq(regressors, target, ridge)).max() for ridge in RIDGES]))
    assert errors[chosen] <= min(errors) * (1 + 1e-6) + 1e-9


def test_the_row_of_one_prompt_is_least_squares():
    regressors, target = regression(noisy=True, num_prompts=1)
    np.testing.assert_allclose(solve_row(*products_of(regressors, target)), ridge_lstsq(regressors, target, 0), rtol=1e-6)


# Polishing


@pytest.fixture(scope="module")
def polished(calibration):
    table = fit_rows(calibration, FOUR)
    return table, polish(calibration, table, rounds=3)


def test_polish_improves_the_prompts_that_it_looks_at(calibration, polished):
    before, after = (decibels(calibration.errors(table)) for table in polished)
    assert after > before + 2


def test_polished_rows_and_timesteps_are_a_sampler(calibration, polished):
    _, table = polished
    assert table.schedule == FOUR
    assert (np.triu(table.coefficients, 1) == 0).all()
    assert (np.diff(table.timesteps) < 0).all()
    assert table.timesteps[0] == node_timesteps(calibration, FOUR)[0]
    assert 0 < table.timesteps[-1] < table.timesteps[0] <= 1
    assert not np.allclose(table.timesteps, node_timesteps(calibration, FOUR), atol=1e-4)


def test_polish_leaves_what_it_was_given_alone(calibration):
    table = fit_rows(calibration, FOUR)
    before = table.coefficients.copy()
    polish(calibration, table, rounds=1)
    np.testing.assert_array_equal(table.coefficients, before)


def objective(calibration, table, soft):
    return np.mean(np.log(calibration.errors(table) ** 2 + soft))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_polish_never_makes_its_objective_worse(seed, num_prompts, rounds):
    calibration = make_calibration(num_prompts, STEPS, seed=seed)
    table = fit_rows(calibration, FOUR)
    soft = module.SOFTNESS * np.median(calibration.errors(table) ** 2)
    polished = polish(calibration, table, rounds=rounds)
    assert objective(calibration, polished, soft) <= objective(calibration, table, soft)
    assert (np.diff(polished.timesteps) < 0).all()


def test_polish_without_rounds_changes_nothing(calibration):
    table = fit_rows(calibration, FOUR)
    same = polish(calibration, table, rounds=0)
    np.testing.assert_array_equal(same.coefficients, table.coefficients)
    np.testing.assert_array_equal(same.timesteps, node_timesteps(calibration, FOUR))


def test_polish_stops_where_nothing_helps(calibration, monkeypatch):
    jacobians, real = [], module._moves
    monkeypatch.setattr(module, "_moves", lambda point, **options: (jacobians.append(point), real(point, **options))[1])
    monkeypatch.setattr(module, "DAMPINGS", (-3.0,))  # uphill
    table = fit_rows(calibration, FOUR)
    np.testing.assert_array_equal(polish(calibration, table, rounds=5).coefficients, table.coefficients)
    assert len(jacobians) == 1


def test_a_step_to_where_the_model_is_not_finite_is_made_shorter(calibration, polished, monkeypatch):
    """All steps but the shortest fail; nothing of that is seen, and the shortest is taken."""
    real, failures = module._play, []

    def play(calibration, schedule, rows, timesteps, known=None, start=0):
        if known is None and failures is not None and len(failures) < 3 and not np.array_equal(rows, table.coefficients):
            failures.append(rows)
            raise InputError("NaN")
        return real(calibration, schedule, rows, timesteps, known, start)

    table, _ = polished
    monkeypatch.setattr(module, "_play", play)
    assert decibels(calibration.errors(polish(calibration, table, rounds=1))) > decibels(calibration.errors(table))
    assert len(failures) == 3


def test_a_jacobian_serves_several_steps_each_from_where_the_last_one_led(calibration, monkeypatch):
    table, jacobians, real = fit_rows(calibration, FOUR), [], module._moves
    monkeypatch.setattr(module, "_moves", lambda point, **options: (jacobians.append(point), real(point, **options))[1])
    soft = module.SOFTNESS * np.median(calibration.errors(table) ** 2)
    reached = []
    for steps in (1, 2, 3):
        monkeypatch.setattr(module, "STEPS_PER_JACOBIAN", steps)
        reached.append(objective(calibration, polish(calibration, table, rounds=1), soft))
    assert reached[2] < reached[1] < reached[0] < objective(calibration, table, soft)
    assert len(jacobians) == 3


def test_polish_may_leave_the_timesteps_alone(calibration, polished):
    table, with_timesteps = polished
    rows_only = polish(calibration, table, rounds=3, move_timesteps=False)
    np.testing.assert_array_equal(rows_only.timesteps, node_timesteps(calibration, FOUR))
    scores = [decibels(calibration.errors(one)) for one in (table, rows_only, with_timesteps)]
    assert scores == sorted(scores)
    assert scores[1] > scores[0] + 0.5


def test_damped_steps_go_down_the_gradient_of_the_objective(calibration, monkeypatch):
    """With a damping so large that each number moves by itself: - gradient / (damping * curvature), both by autograd."""
    damping, rows, timesteps = 1e5, fit_rows(calibration, FOUR).coefficients, node_timesteps(calibration, FOUR)
    monkeypatch.setattr(module, "NUDGE", 1e-6)
    monkeypatch.setattr(module, "DAMPINGS", (damping,))
    monkeypatch.setattr(module, "STEPS_PER_JACOBIAN", 1)
    point = module._play(calibration, FOUR, rows, timesteps)
    soft = module.SOFTNESS * float(np.median(module._squares(calibration, point)))
    reference, at = calibration.latents(STEPS).flatten(1), (torch.from_numpy(rows), torch.from_numpy(timesteps))
    final = closed_loop(calibration, FOUR)

    def value(rows, timesteps):
        squares = (final(rows, timesteps) - reference).square().sum(dim=1) / reference.square().sum(dim=1)
        return torch.log(squares + soft).mean()

    assert module._score(calibration, point, soft) == pytest.approx(value(*at).item())
    by_rows, by_timesteps = (slope.detach().numpy() for slope in torch.func.grad(value, argnums=(0, 1))(*at))
    weights = 1 / ((final(*at) - reference).square().sum(dim=1) + soft * reference.square().sum(dim=1))
    moves = module._moves(point, timesteps=True)
    moved = module._gauss_newton(calibration, FOUR, point, soft, moves)
    for d_rows, d_timesteps, _ in moves:
        column = torch.func.jvp(final, at, (torch.from_numpy(d_rows), torch.from_numpy(d_timesteps)))[1]
        curvature = (weights[:, None] * column**2).sum().item()
        slope = ((by_rows * d_rows).sum() + by_timesteps @ d_timesteps) * calibration.num_prompts / 2
        step = ((moved.rows - rows) * d_rows).sum() + (moved.timesteps - timesteps) @ d_timesteps
        step /= (d_rows**2).sum() + (d_timesteps**2).sum()
        assert step == pytest.approx(-slope / (damping * curvature), rel=0.02, abs=1e-10)


@pytest.mark.parametrize(
    ("number", "size"), [(1, 0.5), (3, -1.0), (2, -0.5)], ids=["past the one before", "below 0", "past the next"]
)
def test_timesteps_never_cross_however_good_that_were(calibration, monkeypatch, number, size):
    rows, timesteps = fit_rows(calibration, FOUR).coefficients, node_timesteps(calibration, FOUR)
    point = module._play(calibration, FOUR, rows, timesteps)
    told = np.zeros(4)
    told[number] = 1.0
    residual = (point.latents[-1] - calibration.latents(STEPS)).flatten(1)
    column = -residual[None] / size  # so that a step of this size leaves no residual
    jacobian = module._Jacobian([(np.zeros((4, 4)), told, number)], column, torch.einsum("mpe,npe->pmn", column, column))
    scores = iter(range(0, -100, -1))
    monkeypatch.setattr(module, "_score", lambda *_: next(scores))  # whatever is tried is better
    monkeypatch.setattr(module, "DAMPINGS", (1e-4,))
    assert module._best_step(calibration, FOUR, point, 1e-3, jacobian) is None
    monkeypatch.setattr(module, "DAMPINGS", (1e-4, 1e3))  # a shorter step is fine
    moved = module._best_step(calibration, FOUR, point, 1e-3, jacobian)
    assert 0 < abs(moved.timesteps[number] - timesteps[number]) < 0.01


def test_polish_goes_on_from_polished_timesteps(calibration, polished):
    _, table = polished
    again = polish(calibration, table, rounds=1)
    assert decibels(calibration.errors(again)) >= decibels(calibration.errors(table))
    np.testing.assert_allclose(again.timesteps, table.timesteps, atol=0.05)


def closed_loop(calibration, schedule):
    """Final latents [P, E] as a differentiable function of rows [K, K] and timesteps [K]."""
    noise, conditions = calibration.noise(), calibration.all_conditions()

    def final(rows, timesteps):
        x, velocities = noise, []
        for i in range(len(schedule.compute)):
            velocities.append(calibration.denoiser.differentiable_velocity(x, timesteps[i], conditions))
            x = noise + sum(rows[i, j] * v for j, v in enumerate(velocities))
        return x.flatten(1)

    return final


@each_schedule
def test_slopes_are_the_derivatives_of_the_closed_loop(calibration, schedule, monkeypatch):
    monkeypatch.setattr(module, "NUDGE", 1e-6)
    rows, timesteps = fit_rows(calibration, schedule).coefficients, node_timesteps(calibration, schedule)
    point = module._play(calibration, schedule, rows, timesteps)
    final = closed_loop(calibration, schedule)
    at = (torch.from_numpy(rows), torch.from_numpy(timesteps))
    torch.testing.assert_close(point.latents[-1].flatten(1), final(*at), rtol=1e-12, atol=1e-12)
    by_rows, by_timesteps = torch.func.jacfwd(final, argnums=(0, 1))(*at)
    for d_rows, d_timesteps, start in module._moves(point, timesteps=True):
        exact = torch.einsum("peij,ij->pe", by_rows, torch.from_numpy(d_rows))
        exact = exact + by_timesteps @ torch.from_numpy(d_timesteps)
        got = module._slope(calibration, schedule, point, (d_rows, d_timesteps, start))
        assert (got - exact).norm() < 1e-4 * exact.norm()


def test_moves_reach_all_rows_and_all_timesteps_but_the_first(calibration):
    point = module._play(calibration, FOUR, fit_rows(calibration, FOUR).coefficients, node_timesteps(calibration, FOUR))
    moves = module._moves(point, timesteps=True)
    directions = np.array([np.concatenate([d_rows[np.tril_indices(4)], d_timesteps]) for d_rows, d_timesteps, _ in moves])
    assert np.linalg.matrix_rank(directions) == len(moves) == 10 + 3
    assert all((np.triu(d_rows, 1) == 0).all() and d_timesteps[0] == 0 for d_rows, d_timesteps, _ in moves)


def test_a_unit_along_any_row_moves_the_latents_by_as_much(calibration):
    point = module._play(calibration, FOUR, fit_rows(calibration, FOUR).coefficients, node_timesteps(calibration, FOUR))
    for d_rows, d_timesteps, start in module._moves(point, timesteps=True):
        if not d_timesteps.any():
            moved = torch.tensordot(torch.from_numpy(d_rows[start - 1]), point.velocities, 1)
            assert moved.square().mean() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("start", range(4))
def test_playing_on_from_a_known_point_equals_playing_all(calibration, start):
    rows, timesteps = fit_rows(calibration, FOUR).coefficients, node_timesteps(calibration, FOUR)
    known = module._play(calibration, FOUR, rows, timesteps)
    changed, told = rows.copy(), timesteps.copy()
    changed[max(start - 1, 0) :] *= 1.1  # row start - 1 leads to computed step start
    told[start:] *= 0.9
    if not start:
        changed = rows * 1.1
    on, all_of_it = (module._play(calibration, FOUR, changed, told, *more) for more in ((known, start), ()))
    for got, expected in zip(on.latents[start:], all_of_it.latents[start:], strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(known.latents[-1], module._play(calibration, FOUR, rows, timesteps).latents[-1])


# Training by gradients


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
    assert all(p.grad is None for p in calibration.denoiser._compute.parameters())


def test_a_loss_that_is_not_finite_says_so(calibration):
    broken = replace(calibration, conditions={"prompt": torch.full_like(calibration.conditions["prompt"], torch.nan)})
    with pytest.raises(InputError, match=r"bns: the loss is not finite at update 0: lower --set rate \(0.005\)"):
        train_rows(broken, FOUR, updates=5, batch=2, rate=5e-3)


# The methods


def test_gram_without_polish_is_the_closed_form(calibration):
    parameters = Gram(polish=0).calibrate(calibration, FOUR)
    assert set(parameters.tensors) == {"rows"}
    assert parameters.origin == "the toy's runs"
    table = Gram(polish=0).table(FOUR, calibration.sigmas, parameters)
    np.testing.assert_array_equal(table.coefficients, fit_rows(calibration, FOUR).coefficients)
    assert table.timesteps is None


def test_gram_fits_rows_to_all_prompts_and_polishes_on_the_first(monkeypatch):
    monkeypatch.setattr("cachec.compiler.methods.gram.POLISH_PROMPTS", 4)
    monkeypatch.setattr("cachec.compiler.methods.gram.MIN_POLISH_PROMPTS", 9)
    calibration = make_calibration(9)
    parameters = Gram(polish=2).calibrate(calibration, FOUR)
    assert parameters.tensors["rows"].dtype == parameters.tensors["timesteps"].dtype == torch.float64
    table = Gram().table(FOUR, calibration.sigmas, parameters)
    expected = polish(calibration.select(range(4)), fit_rows(calibration, FOUR), rounds=2)
    np.testing.assert_array_equal(table.coefficients, expected.coefficients)
    np.testing.assert_array_equal(table.timesteps, expected.timesteps)
    assert decibels(calibration.errors(table)) > decibels(calibration.errors(fit_rows(calibration, FOUR)))


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 5])
def test_gram_works_with_few_prompts(num_prompts):
    calibration = make_calibration(num_prompts)
    table = Gram(polish=1).table(FOUR, calibration.sigmas, Gram(polish=1).calibrate(calibration, FOUR))
    assert decibels(calibration.errors(table)) > 30


def test_gram_does_not_polish_on_too_few_prompts_and_says_so(caplog):
    calibration = make_calibration(15)
    parameters = Gram(polish=2).calibrate(calibration, FOUR)
    assert set(parameters.tensors) == {"rows"}
    assert caplog.messages == ["fitted on 15 prompts, not polished: that takes 16"]
    assert set(Gram(polish=1).calibrate(make_calibration(16), FOUR).tensors) == {"rows", "timesteps"}


def test_drafts_are_gram_without_polish():
    assert Gram(polish=7).draft() == Bns().draft() == Gram(polish=0)
    assert GramHidden().draft() == GramHidden()


def test_bns_calibrates_by_training(calibration):
    method = Bns(updates=3, batch=2, rate=1e-2)
    table = method.table(FOUR, calibration.sigmas, method.calibrate(calibration, FOUR))
    np.testing.assert_array_equal(table.coefficients, train_rows(calibration, FOUR, updates=3, batch=2, rate=1e-2))


@each_schedule
def test_gram_hidden_rows_equal_lstsq_on_raw_features(calibration, schedule, no_ridge):
    table = GramHidden().table(schedule, calibration.sigmas, GramHidden().calibrate(calibration, schedule))
    assert isinstance(table, ForecastTable)
    assert not table.bias.any()
    _, features = raw_runs(calibration)  # [P, T, E]
    for step in range(STEPS):
        past = [i for i, s in enumerate(schedule.compute) if s < step]
        row = np.zeros(len(schedule.compute))
        if step not in schedule.compute:
            design = features[:, [schedule.compute[i] for i in past]].transpose(0, 2, 1).reshape(-1, len(past))
            row[past] = np.linalg.lstsq(design, features[:, step].reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(table.coefficients[step], row, rtol=1e-6, atol=1e-8)


def test_a_forecast_table_is_played_with_the_tail_at_its_steps(calibration):
    table = GramHidden().table(FOUR, calibration.sigmas, GramHidden().calibrate(calibration, FOUR))
    table = ForecastTable(FOUR, table.coefficients, np.linspace(0, 0.01, STEPS))
    denoiser, conditions, x, features = calibration.denoiser, calibration.all_conditions(), calibration.noise(), []
    for step in range(STEPS):
        if step in FOUR.compute:
            velocity, feature = denoiser.compute(x, step, conditions)
            features.append(feature.numpy())
        else:
            stacked = np.stack([*features, *[np.zeros_like(features[0])] * (4 - len(features))])
            forecast = np.tensordot(table.coefficients[step], stacked, 1) + table.bias[step]
            velocity = denoiser.tail(torch.from_numpy(forecast), step, conditions)
        x = x + float(calibration.sigmas[step + 1] - calibration.sigmas[step]) * velocity
    torch.testing.assert_close(calibration.run(table), x, rtol=1e-10, atol=1e-10)


METHODS = [Gram(), Bns(), GramHidden()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def fitted(method, calibration):
    shape = (STEPS, 4) if method.cut == "hidden" else (4, 4)
    return Parameters({"rows": torch.zeros(shape)}, schedule_facts(method.name, calibration, FOUR), "a file")


@each_method
def test_rows_of_this_schedule_are_taken(calibration, method):
    assert method.table(FOUR, calibration.sigmas, fitted(method, calibration)).schedule == FOUR


@each_method
def test_without_rows_a_method_says_what_it_needs(calibration, method):
    with pytest.raises(PredictorError, match=f"{method.name} needs rows fitted to calibration runs: give --calibration"):
        method.table(FOUR, calibration.sigmas, None)


@each_method
@pytest.mark.parametrize(
    "schedule", [Schedule(STEPS, (0, 2, 5, 9)), Schedule(STEPS, (0, 2, 5)), Schedule(20, FOUR.compute)], ids=str
)
def test_rows_of_another_schedule_are_refused(calibration, method, schedule):
    with pytest.raises(PredictorError, match=f"rows of {method.name} were fitted to steps 0,2,5,8"):
        method.table(schedule, calibration.sigmas, fitted(method, calibration))


@each_method
def test_fits_say_what_they_were_fitted_to(calibration, method):
    method = method if method.name == "gram-hidden" else (Bns(updates=1) if method.name == "bns" else Gram(polish=0))
    facts = method.calibrate(calibration, FOUR).facts
    assert facts == {
        "method": method.name,
        "steps": "12",
        "schedule": "0,2,5,8",
        "num_prompts": "6",
        "target": "uncached run",
    }


def test_fits_to_a_fine_reference_say_so():
    calibration = make_calibration(num_steps=4, fine_steps=STEPS, fine=True)
    assert Gram(polish=0).calibrate(calibration, FOUR).facts["target"] == "fine reference"
    with pytest.raises(InputError, match="features are recorded on the run's own steps only"):
        GramHidden().calibrate(calibration, FOUR)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Gram, {"polish": "-1"}, "polish is -1"),
        (Bns, {"updates": "0"}, "updates is 0"),
        (Bns, {"batch": "0"}, "batch is 0"),
        (Bns, {"rate": "0"}, "rate is 0.0"),
        (Bns, {"rate": "nan"}, "must be finite"),
        (GramHidden, {"polish": "1"}, "has no options"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        method.with_options(options)


def test_the_toy_is_as_large_as_it_says(calibration):
    assert calibration.num_elements == TOKENS * CHANNELS
