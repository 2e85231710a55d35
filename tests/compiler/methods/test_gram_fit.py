"""Fits on latents that the rows themselves led to, against straight-line lstsq, autograd, and what must hold by design."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_calibration import make_calibration

import cachec.compiler.methods.gram_fit as module
from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.gram_fit import RIDGES, fit_rows, node_timesteps, polish, solve_row
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

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


def lstsq_rows(calibration, schedule):
    """The fit written out: run to a node, regress the displacement there on all velocities so far, go on from there."""
    noise, conditions = calibration.noise(), calibration.all_conditions()
    x, velocities, rows = noise, [], np.zeros((len(schedule.compute), len(schedule.compute)))
    for i, (step, end) in enumerate(zip(schedule.compute, ends_of(schedule), strict=True)):
        velocities.append(calibration.evaluator.evaluate(x, calibration.sampling.timesteps[step], conditions)[0])
        design = np.stack(velocities).reshape(i + 1, -1).T
        rows[i, : i + 1] = np.linalg.lstsq(design, (calibration.latents(end) - noise).ravel(), rcond=None)[0]
        x = noise + sum(float(c) * v for c, v in zip(rows[i], velocities, strict=False))
    return rows, x


def play(calibration, table):
    return calibration.play(calibration.program(table))


@each_schedule
def test_rows_equal_lstsq_node_by_node(calibration, schedule, no_ridge):
    table = fit_rows(calibration, schedule)
    rows, final = lstsq_rows(calibration, schedule)
    assert isinstance(table, AdvanceTable)
    assert (table.schedule, table.timesteps) == (schedule, None)
    np.testing.assert_allclose(table.coefficients, rows, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(play(calibration, table), final, rtol=1e-5, atol=1e-6)  # a Program's rows are float32


def test_a_ridge_chosen_over_prompts_changes_little_where_data_is_good(calibration):
    rows, _ = lstsq_rows(calibration, FOUR)
    np.testing.assert_allclose(fit_rows(calibration, FOUR).coefficients, rows, rtol=0.05, atol=0.02)


def test_with_a_fine_reference_rows_lead_to_it(no_ridge):
    calibration = make_calibration(num_steps=4, fine_steps=STEPS, fine=True)
    assert calibration.num_steps == STEPS
    rows, final = lstsq_rows(calibration, FOUR)
    table = fit_rows(calibration, FOUR)
    np.testing.assert_allclose(table.coefficients, rows, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(play(calibration, table), final, rtol=1e-5, atol=1e-6)
    assert calibration.errors(table).max() < 0.05


def test_every_step_computed_is_the_reference(calibration):
    table = fit_rows(calibration, Schedule(STEPS, tuple(range(STEPS))))
    assert calibration.errors(table).max() < 1e-6
    euler = np.tril(np.broadcast_to(np.diff(calibration.sigmas), (STEPS, STEPS)))
    np.testing.assert_allclose(table.coefficients[:3], euler[:3], atol=1e-5)


@each_schedule
def test_velocities_that_do_not_change_need_one_step(schedule):
    calibration = make_calibration(num_steps=STEPS, curved=False)
    table = fit_rows(calibration, schedule)
    assert calibration.errors(table).max() < 1e-6
    moved = calibration.sigmas[ends_of(schedule)] - calibration.sigmas[0]
    np.testing.assert_allclose(table.coefficients.sum(axis=1), moved, rtol=1e-8)


def test_one_prompt_is_enough_and_many_are_run_in_batches():
    one, many = make_calibration(1), make_calibration(37)
    assert one.errors(fit_rows(one, FOUR)).max() < 0.05
    table = fit_rows(many, FOUR)
    alone = np.concatenate([many.select([i]).errors(table) for i in range(37)])
    np.testing.assert_allclose(many.errors(table), alone, rtol=1e-5)


def test_a_run_that_is_not_finite_names_the_prompt_and_the_step(calibration):
    prompt = calibration.conditions["prompt"].copy()
    prompt[3] = np.nan
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


@pytest.mark.parametrize("num_prompts", [2, 11])
@pytest.mark.parametrize("share", [0.0, 0.3])
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


def objective(calibration, table, soft):
    return np.mean(np.log(calibration.errors(table) ** 2 + soft))


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_polish_never_makes_its_objective_worse(num_prompts):
    calibration = make_calibration(num_prompts, STEPS, seed=1)
    table = fit_rows(calibration, FOUR)
    soft = module.SOFTNESS * np.median(calibration.errors(table) ** 2)
    polished = polish(calibration, table, rounds=3)
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
    reference = torch.from_numpy(calibration.latents(STEPS)).flatten(1)
    at = (torch.from_numpy(rows), torch.from_numpy(timesteps))
    final = closed_loop(calibration, FOUR)

    def value(rows, timesteps):
        squares = (final(rows, timesteps) - reference).square().sum(dim=1) / reference.square().sum(dim=1)
        return torch.log(squares + soft).mean()

    assert module._score(calibration, point, soft) == pytest.approx(value(*at).item())
    by_rows, by_timesteps = (slope.numpy() for slope in torch.autograd.functional.jacobian(value, at))
    jacobian = torch.autograd.functional.jacobian(final, at)
    weights = 1 / ((final(*at).detach() - reference).square().sum(dim=1) + soft * reference.square().sum(dim=1))
    moves = module._moves(point, timesteps=True)
    moved = module._gauss_newton(calibration, FOUR, point, soft, moves)
    for d_rows, d_timesteps, _ in moves:
        column = jacobian[0].flatten(2) @ torch.from_numpy(d_rows).flatten() + jacobian[1] @ torch.from_numpy(d_timesteps)
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
    residual = (point.latents[-1] - calibration.latents(STEPS)).reshape(calibration.num_prompts, -1)
    column = -residual[None] / size  # so that a step of this size leaves no residual
    jacobian = module._Jacobian([(np.zeros((4, 4)), told, number)], column, np.einsum("mpe,npe->pmn", column, column))
    scores = iter(range(0, -100, -1))
    monkeypatch.setattr(module, "_score", lambda *_: next(scores))  # whatever is tried is better
    monkeypatch.setattr(module, "DAMPINGS", (1e-4,))
    assert module._best_step(calibration, FOUR, point, 1e-3, jacobian) is None
    monkeypatch.setattr(module, "DAMPINGS", (1e-4, 1e3))  # a shorter step is fine
    moved = module._best_step(calibration, FOUR, point, 1e-3, jacobian)
    assert 0 < abs(moved.timesteps[number] - timesteps[number]) < 0.01


def closed_loop(calibration, schedule):
    """Final latents [P, E] as a differentiable function of rows [K, K] and timesteps [K]."""
    noise = torch.from_numpy(calibration.noise())
    conditions = {name: torch.from_numpy(value) for name, value in calibration.all_conditions().items()}

    def final(rows, timesteps):
        x, velocities = noise, []
        for i in range(len(schedule.compute)):
            velocities.append(calibration.evaluator.evaluate_with_gradients(x, timesteps[i], conditions)[0])
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
    reached = point.latents[-1].reshape(calibration.num_prompts, -1)
    np.testing.assert_allclose(reached, final(*at).detach(), rtol=1e-12, atol=1e-12)
    by_rows, by_timesteps = torch.autograd.functional.jacobian(final, at)
    for d_rows, d_timesteps, start in module._moves(point, timesteps=True):
        exact = torch.einsum("peij,ij->pe", by_rows, torch.from_numpy(d_rows))
        exact = exact + by_timesteps @ torch.from_numpy(d_timesteps)
        got = module._slope(calibration, schedule, point, (d_rows, d_timesteps, start))
        assert np.linalg.norm(got - exact.detach().numpy()) < 1e-4 * exact.norm()


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
            moved = np.tensordot(d_rows[start - 1], point.velocities, 1)
            assert (moved**2).mean() == pytest.approx(1, rel=1e-6)


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
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(known.latents[-1], module._play(calibration, FOUR, rows, timesteps).latents[-1])
