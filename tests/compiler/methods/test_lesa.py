"""LESA's table against the published recursion, step by step."""

from collections import deque

import numpy as np
import pytest
import torch
from toy_lesa import parameters_of, random_lesa, sigmas_of, textbook_kan

from cachec.compiler.methods.lesa import STAGE_BOUNDS, WINDOWS, Lesa, LesaPredictor
from cachec.compiler.methods.parameters import Parameters
from cachec.runtime.abi import BRANCHES
from cachec.runtime.errors import InputError, PredictorError

SHAPE = (2, 3)


def lesa_step_by_step(predictor, features, schedule, sigmas):
    """LESA as published: a deque of the last eight features, forecasts among them (arXiv 2602.20497)."""
    history, result = deque(maxlen=8), {}
    t = torch.from_numpy(sigmas)
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.append(features[step])
            continue
        expert = sum(float(t[step]) <= bound for bound in STAGE_BOUNDS)
        with torch.no_grad():
            alpha = textbook_kan(predictor.kans[expert], t[step] - t).item()
        entries = list(reversed(history))
        entries += [entries[-1]] * (WINDOWS[expert] - len(entries))
        mix = predictor.mixes[expert]
        z = sum(w * f for w, f in zip(mix.weight[0].tolist(), entries, strict=False)) + mix.bias.item()
        result[step] = entries[0] + alpha * z
        history.append(result[step])
    return result


def test_the_table_is_the_recursion_with_its_bias():
    num_steps = 28
    schedule, predictor, rng = Lesa().interval(num_steps, 7), random_lesa(num_steps), np.random.default_rng(2)
    features = {step: rng.standard_normal(SHAPE) for step in schedule.compute}
    table = Lesa().table(schedule, sigmas_of(num_steps), parameters_of(predictor, num_steps))
    expected = lesa_step_by_step(predictor, features, schedule, sigmas_of(num_steps))
    stacked = np.stack([features[step] for step in schedule.compute])
    scale = max(np.abs(value).max() for value in expected.values())
    for step, value in expected.items():
        got = np.tensordot(table.rows[step], stacked, 1) + table.bias[step]
        np.testing.assert_allclose(got, value, atol=1e-6 * scale)
    assert np.abs(table.bias[list(schedule.forecast)]).max() > 1e-3


def test_each_branch_of_guidance_has_a_predictor_of_its_own():
    num_steps = 28
    schedule, sigmas = Lesa().interval(num_steps, 7), sigmas_of(num_steps)
    ones = [parameters_of(random_lesa(num_steps, seed), num_steps) for seed in (0, 1)]
    both = {f"branches.{n}.{k}": v for n, one in zip(BRANCHES, ones, strict=True) for k, v in one.arrays.items()}
    made = Lesa().table(schedule, sigmas, Parameters(both, {"steps": str(num_steps)}, "a file"))
    for place, one in enumerate(ones):
        alone = Lesa().table(schedule, sigmas, one)
        np.testing.assert_array_equal(made.coefficients[:, place], alone.coefficients[:, 0])
        np.testing.assert_array_equal(made.bias[:, place], alone.bias)
    with pytest.raises(PredictorError, match=r"a file holds a predictor for each branch of guidance; .*branches=shared"):
        Lesa().predictor(Parameters(both, {"steps": str(num_steps)}, "a file"))
    one_branch = {key: value for key, value in both.items() if "negative" in key}
    for damaged in (one_branch, {**both, "more": np.zeros(1)}):
        with pytest.raises(
            PredictorError, match="a file does not hold a LESA predictor of each branch of guidance, and nothing"
        ):
            Lesa().table(schedule, sigmas, Parameters(damaged, {"steps": str(num_steps)}, "a file"))


def test_the_file_says_where_the_third_expert_begins():
    num_steps = 28
    schedule, sigmas, own = (
        Lesa().interval(num_steps, 7),
        sigmas_of(num_steps),
        parameters_of(random_lesa(num_steps), num_steps),
    )
    later = Parameters(own.arrays, {**own.facts, "second_bound": "0.4"}, "a test")
    early, late = (Lesa().table(schedule, sigmas, one).bias for one in (own, later))
    between = [step for step in schedule.forecast if 0.4 < sigmas[step] <= 0.5]
    assert between
    assert early[between[0]] != late[between[0]]
    np.testing.assert_array_equal(early[: between[0]], late[: between[0]])
    for wrong in ("nan", "later", "0.95"):
        with pytest.raises(PredictorError, match=f"a test: second_bound is .*{wrong}.*, no noise level below 0.9"):
            Lesa().table(schedule, sigmas, Parameters(own.arrays, {**own.facts, "second_bound": wrong}, "a test"))


@torch.no_grad()
def test_an_untrained_lesa_is_nearly_plain_reuse():
    torch.manual_seed(0)
    features, sigmas = list(torch.randn(max(WINDOWS), 2, 3)), torch.from_numpy(sigmas_of(28))
    for step in (4, 10, 27):  # an expert each
        forecast = LesaPredictor(28)(features, torch.zeros(max(WINDOWS)), sigmas, torch.tensor(step))
        assert (forecast - features[0]).abs().max() < 0.1


def test_its_schedule_is_the_published_one():
    assert Lesa().interval(50, 7).compute == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


def test_without_parameters_or_with_foreign_ones_it_is_refused():
    with pytest.raises(PredictorError, match="lesa needs a trained predictor"):
        Lesa().predictor(None)
    with pytest.raises(PredictorError, match="somewhere does not hold a LESA predictor"):
        Lesa().predictor(Parameters({"x": np.zeros(1)}, {"steps": "50"}, "somewhere"))
    with pytest.raises(InputError, match="max_rounds is 0"):
        Lesa(max_rounds=0)
    with pytest.raises(InputError, match="unknown branches 'both'.*apart, shared"):
        Lesa(branches="both")
    with pytest.raises(InputError, match=r"second_bound is 0.95; it is a noise level above 0 and below 0.9"):
        Lesa(second_bound=0.95)
