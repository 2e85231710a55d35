"""Graphs of a pipeline's parts, on a part of a few lines."""

import pytest
import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_component
from cachec.compiler.graphs.components import ComponentGraph, _groups, _part
from cachec.passes.base import outputs, placeholders


class Encoders(nn.Module):
    """Two that share nothing, with dropout, which FX takes for something that must stay; one hands its mask on, too."""

    def __init__(self):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = nn.Embedding(7, 8), nn.Embedding(7, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, inputs):
        first = nn.functional.dropout(self.text_encoder(inputs["a"]), 0.0)
        second = self.out(self.text_encoder_2(inputs["b"]).double().float()) * inputs["mask"][..., None]
        return {"pooled": first.mean(1), "states": second, "given": inputs["mask"].bool()}


@pytest.fixture(scope="module")
def inputs():
    ids = torch.arange(5)[None]
    return {"a": ids % 7, "b": (ids + 2) % 7, "mask": (ids < 3).long()}


@pytest.fixture(scope="module")
def whole(inputs):
    torch.manual_seed(0)
    return capture_component(Encoders().eval(), inputs, ("pooled", "states", "given"))


def test_what_shares_nothing_is_a_graph_of_its_own(whole, inputs):
    assert _groups(whole) == [["pooled"], ["states", "given"]]
    part = _part(whole, ["pooled"])
    assert (list(placeholders(part)), list(outputs(part))) == (["a"], ["pooled"])
    with torch.no_grad():
        torch.testing.assert_close(part(a=inputs["a"])["pooled"], whole(**inputs)["pooled"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_precision_leaves_results_wide_and_masks_masks(whole, inputs, dtype):
    graph = ComponentGraph("text_encoder_2", whole, inputs).cast(dtype)
    made, wanted = graph.run(inputs), whole(**inputs)
    assert {name: value.dtype for name, value in made.items()} == {
        "pooled": torch.float32, "states": torch.float32, "given": torch.bool,
    }  # fmt: skip
    torch.testing.assert_close(made["states"], wanted["states"], rtol=0.02, atol=0.02)
    assert torch.equal(made["given"], wanted["given"])
    assert {spec.name: spec.dtype for spec in graph.plan("any").signature.outputs}["given"] == "bool"
