"""One set of engines for all sizes, or one for each."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.engine_sets import choose_sets
from cachec.compiler.graphs.export import plan_engine
from cachec.compiler.models.base import Settings
from cachec.runtime.abi import MODEL

SMALL = Settings(16, 32, 8, 1.0, 4, "float32")
SETTINGS = (SMALL, replace(SMALL, width=48))


class Toy(nn.Module):
    """x [B, L, 4] with positions."""

    def __init__(self, tokens, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.register_buffer("table", torch.arange(4 * tokens).view(tokens, 4) / tokens)

    def forward(self, x):
        return (self.layer(x + self.table) * self.scale,)


@pytest.fixture
def choose():
    layer = nn.Linear(4, 4)

    def plans(tokens, scale):
        inputs = {"x": torch.randn(2, tokens, 4)}
        return [plan_engine(MODEL, capture_model(Toy(tokens, layer, scale), inputs).modules[MODEL], inputs, {})]

    def choose(*scales, static=None):
        model = SimpleNamespace(transformer=layer, stored=None)
        return choose_sets(model, SETTINGS, [plans(2, scales[0]), plans(3, scales[-1])], static=static)

    return choose


def test_one_set_is_for_all_sizes(choose):
    sets = choose(1.0)
    assert list(sets.plans) == ["32x16+48x16, 8 text tokens"]
    assert sets.axes == {"32x16, 8 text tokens": {"size_1": 2}, "48x16, 8 text tokens": {"size_1": 3}}
    np.testing.assert_allclose(sets.tables["48x16, 8 text tokens"]["table_1"], np.arange(12).reshape(3, 4) / 3, rtol=1e-6)
    assert sets.facts == {}


def test_where_graphs_differ_there_is_a_set_for_each_and_it_is_said(choose, caplog):
    sets = choose(1.0, 2.0)
    assert list(sets.plans) == ["32x16, 8 text tokens", "48x16, 8 text tokens"]
    assert "model is another graph at another size: at mul it takes 1.0 and 2.0" in sets.facts["engines_for_each_size"]
    assert "one set of engines is built for each size: model is another graph" in caplog.text


def test_one_set_for_each_where_it_is_asked_for(choose):
    sets = choose(1.0, static="asked for")
    assert len(sets.plans) == 2
    assert sets.facts == {"engines_for_each_size": "asked for"}
