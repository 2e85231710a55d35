"""Wan 2.2: two transformers share a run, and each computes what is asked of it."""

import pytest
from families import FAMILIES

import cachec
from cachec.compiler.drop_in.transformer import AcceleratedTransformer
from cachec.runtime.abi import EXPERT
from cachec.runtime.errors import InputError

pytestmark = pytest.mark.slow
WAN = next(family for family in FAMILIES if family.name == "wan-2.2")
SIZES = {"height": WAN.call["height"], "width": WAN.call["width"], "frames": WAN.call["num_frames"]}


@pytest.fixture(scope="module")
def fast():
    """It computes every step."""
    options = {"text_tokens": WAN.call["max_sequence_length"], "steps": 3, "schedule": "0,1,2", "compiled": False}
    pipeline = WAN.make()
    pipeline.set_progress_bar_config(disable=True)
    return cachec.accelerate(pipeline, method="adams", **options, **SIZES)


@pytest.fixture(scope="module")
def plain():
    pipeline = WAN.make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("steps", [3, 4])
def test_both_answer_in_one_run(fast, plain, steps):
    first, second = fast.transformer, fast.transformer_2
    assert isinstance(second, AcceleratedTransformer)
    assert second._runs is first._runs
    got, wanted = (WAN.run(one, num_inference_steps=steps) for one in (fast, plain))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    graphs = {one.graph for one in first.program.instructions if one.computes}
    assert EXPERT in graphs


def test_another_boundary_is_followed(fast, plain):
    for one in (fast, plain):
        one.register_to_config(boundary_ratio=0.95)
    got, wanted = (WAN.run(one) for one in (fast, plain))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_a_weight_of_the_second_that_changed_is_seen(fast):
    fast.transformer_2.original.proj_out.bias.data += 1
    with pytest.raises(InputError, match="values of the weights were changed in place since this pipeline was accelerated"):
        WAN.run(fast)
