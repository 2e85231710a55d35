"""Runs that leave the range of their precision are refused with the place."""

import pytest
import torch
from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs.finite import check_finite_run
from cachec.compiler.graphs.prepare import prepare
from cachec.runtime.errors import EngineError


def toy(scale):
    """The toy with features of about that size."""
    model = ToyModel()
    with torch.no_grad():
        model.transformer.embed.weight.mul_(scale)
    return model


def test_a_finite_run_is_taken():
    model = ToyModel()
    check_finite_run(prepare(model, SETTINGS), model.example_inputs(SETTINGS), "float32", "float16")


def test_what_is_not_finite_is_named_with_its_place_and_precision():
    model = ToyModel()
    with torch.no_grad():
        model.transformer.blocks[1].mlp[2].bias[3] = torch.nan
    message = r"in float16 an example run of the model is not finite, first at \w+ \(aten.*linear.* in blocks\.1\.mlp\.2\)"
    with pytest.raises(EngineError, match=message):
        check_finite_run(prepare(model, SETTINGS), model.example_inputs(SETTINGS), "float16")


def test_features_that_their_slots_cannot_hold_are_named():
    model = toy(1e6)
    split, inputs = prepare(model, SETTINGS), model.example_inputs(SETTINGS)
    check_finite_run(split, inputs, "float32", "bfloat16")
    with pytest.raises(EngineError, match=r"features of an example run reach .*, which is out of the range of float16"):
        check_finite_run(split, inputs, "float32", "float16")
