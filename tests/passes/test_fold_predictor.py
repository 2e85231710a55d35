import pytest
import torch
from toy_bundle import SCHEDULE, SIGMAS, add_predictor, captured, histories
from toy_predictors import UNFOLDABLE, Formula, random_lesa
from toy_runs import random_past, tail_inputs, unfolded_inputs

from cachec.compiler.graphs.prepare import linear
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import binding_times, fold_step
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import PredictorError

PREDICTORS = {
    "reuse": (Reuse().predictor(None), 1, False),
    "taylor-1": (Taylor(1).predictor(None), 2, False),
    "taylor-2": (Taylor(2).predictor(None), 3, False),
    "lesa": (random_lesa(), 8, True),
}
every_predictor = pytest.mark.parametrize(("predictor", "window", "feeds_back"), PREDICTORS.values(), ids=PREDICTORS.keys())


def fold(predictor, window, feeds_back=False):
    """The row [W] and the bias of every forecast, by step."""
    parts, sigmas = binding_times(captured(predictor, window)), torch.from_numpy(SIGMAS)
    return {step: fold_step(parts, sigmas, step, past) for step, past in histories(window, feeds_back=feeds_back).items()}


@every_predictor
@torch.no_grad()
def test_folded_equals_unfolded(toy_split, predictor, window, feeds_back):
    rows = fold(predictor, window, feeds_back)
    unfolded = add_predictor(toy_split, predictor, window).modules[FORECAST]
    folded = linear(toy_split).modules[FORECAST]
    for step, history in histories(window, feeds_back=feeds_back).items():
        past = random_past(window, 2, seed=step)
        wanted = unfolded(**unfolded_inputs(unfolded, past, step, history))["velocity"]
        row, bias = rows[step][0].float(), torch.tensor(rows[step][1])
        got = folded(features=torch.stack(past), coefficients=row[None], bias=bias, **tail_inputs(folded, 2))["velocity"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@every_predictor
@torch.no_grad()
def test_rows_say_what_the_predictor_does(predictor, window, feeds_back):
    rows = fold(predictor, window, feeds_back)
    for step, history in histories(window, feeds_back=feeds_back).items():
        past = random_past(window, 2, seed=step)
        wanted = predictor(past, torch.tensor(history), torch.from_numpy(SIGMAS), torch.tensor(step))
        row, bias = rows[step]
        got = torch.einsum("w,w...->...", row.float(), torch.stack(past)) + bias
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("order", "row"), [(0, [1.0]), (1, [3.0, -2.0])])
def test_rows_of_taylor_are_the_published_ones(order, row):
    rows = fold(Taylor(order).predictor(None), order + 1)
    assert rows[5][0].tolist() == row  # two steps after step 3, which is one after step 2
    assert SCHEDULE.compute == (0, 2, 3, 6)


@pytest.mark.parametrize("formula", UNFOLDABLE.values(), ids=UNFOLDABLE.keys())
def test_a_predictor_that_is_not_one_number_per_feature_is_refused(formula):
    with pytest.raises(PredictorError, match="--fold none"):
        fold(Formula(formula), 2)


def test_an_affine_predictor_with_a_bias_folds():
    rows = fold(Formula(lambda p, f0, f1: 1.5 * f0 - 0.5 * f1 + 0.25), 2)
    row, bias = rows[SCHEDULE.forecast[0]]
    assert row.tolist() == pytest.approx([1.5, -0.5], abs=1e-12)
    assert bias == pytest.approx(0.25, abs=1e-12)
