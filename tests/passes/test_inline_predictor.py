"""A predictor that is not folded stays in front of the tail."""

import pytest
import torch
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import add_predictor, captured
from toy_predictors import UNFOLDABLE, Formula, random_lesa
from toy_runs import random_past, tail_inputs, unfolded_inputs

from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import InlinePredictor, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import PassError


def test_inlining_keeps_what_the_predictor_reads_as_inputs(toy_split):
    names = placeholders(add_predictor(toy_split, Taylor(1).predictor(None), 2).modules[FORECAST])
    assert set(names) == {"feature_0", "feature_1", "history_steps", "step", "timestep", "prompt"}


def test_adding_a_predictor_leaves_the_split_alone(toy_split):
    before = list(placeholders(toy_split.modules[FORECAST]))
    graphs = add_predictor(toy_split, random_lesa(), 8)
    assert list(placeholders(toy_split.modules[FORECAST])) == before
    assert graphs.modules["compute"](**example_inputs())["velocity"].shape == (2, TOKENS, WIDTH)


@pytest.mark.parametrize("formula", UNFOLDABLE.values(), ids=UNFOLDABLE.keys())
@torch.no_grad()
def test_any_predictor_can_stay_in_the_engine(toy_split, formula):
    predictor = Formula(formula)
    graphs = add_predictor(toy_split, predictor, 2)
    past = random_past(2, 2, seed=0)
    module = graphs.modules[FORECAST]
    result = module(**unfolded_inputs(module, past, 4, (2, 1)))
    assert torch.equal(result["feature"], formula(predictor, *past))
    tail = toy_split.modules[FORECAST]
    assert torch.equal(result["velocity"], tail(feature=result["feature"], **tail_inputs(tail, 2))["velocity"])


def test_a_predictor_is_inlined_once(toy_split):
    inline = InlinePredictor(captured(Reuse().predictor(None), 1))
    with pytest.raises(PassError, match="no input 'feature'; run split_model first"):
        run_passes(toy_split, [inline, inline])
