"""One graph from those of several sizes."""

import pytest
import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.export import plan_engine
from cachec.compiler.graphs.shared import share_plans
from cachec.runtime.abi import MODEL
from cachec.runtime.errors import PassError

WIDTH = 4


class Toy(nn.Module):
    """x [B, L, 4] with positions, mixed in pairs of tokens, and as many ones behind as there are tokens twice."""

    def __init__(self, tokens, layers=(), *, scale=1.0, kind="sin"):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        positions = torch.arange(tokens)[:, None] / torch.arange(1, WIDTH + 1)
        self.register_buffer("table", getattr(torch, kind)(positions))
        self.register_buffer("again", self.table.clone())
        self.tokens, self.scale = tokens, scale

    def forward(self, x):
        for layer in self.layers:
            x = layer(x * self.table) + self.again
        pairs = torch.cat(x.split([self.tokens - 2, 2], 1)[::-1], 1).reshape(-1, self.tokens // 2, 2 * WIDTH) * self.scale
        return (torch.cat([pairs, pairs + torch.ones(2 * self.tokens)[-1]], 1),)


def plans(tokens, *args, **options):
    inputs = {"x": torch.randn(2, tokens, WIDTH)}
    graphs = capture_model(Toy(tokens, *args, **options), inputs)
    return [plan_engine(MODEL, graphs.modules[MODEL], inputs, {})]


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]


@torch.no_grad()
def test_the_one_graph_is_that_of_each_size(layers):
    sizes = (6, 10, 8)
    shared = share_plans([plans(tokens, layers) for tokens in sizes], compare=True)
    (plan,) = shared.plans
    x, *others = plan.signature.inputs
    assert x.shape == ("batch", "size_1", WIDTH)
    assert [axes["size_1"] for axes in shared.axes] == list(sizes)
    tables = [spec for spec in others if spec.shape == ("size_1", WIDTH)]
    assert len(tables) == 1  # the same numbers are one input, in however many layers
    assert {len(tensor) for tensor in shared.tables[1].values()} >= {10, 5}  # half of the tokens: no input's axis has it
    module = plan.program.module()
    for place, tokens in enumerate(sizes):
        given = torch.randn(3, tokens, WIDTH)
        (wanted,) = Toy(tokens, layers)(given)
        taken = {spec.name: shared.tables[place][spec.name] for spec in others}
        assert torch.equal(module(x=given, **taken)["velocity"], wanted)
        assert plan.signature.outputs[0].resolve({"batch": 3, **shared.axes[place]}) == tuple(wanted.shape)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layers": 1}, "is another graph at another size|nodes"),
        ({"scale": 2.0}, "at mul.* it takes 1.0 and 2.0"),
        ({"new": True}, "it is a weight with other values"),
    ],
)
def test_graphs_that_differ_otherwise_are_refused_with_the_place(layers, other, said):
    own = [nn.Linear(WIDTH, WIDTH) for _ in layers] if other.pop("new", False) else layers[: other.pop("layers", 2)]
    with pytest.raises(PassError, match=said):
        share_plans([plans(6, layers), plans(8, own, **other)], compare=True)


class Behind(nn.Module):
    """The last tokens of x [B, L, 4], counted from the end."""

    def __init__(self, tokens):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.tokens = tokens

    def forward(self, x):
        return (self.layer(x)[:, -self.tokens :],)


def test_numbers_that_no_axis_has_are_refused():
    (two, three), inputs = (Behind(2), Behind(3)), {"x": torch.randn(2, 8, WIDTH)}
    three.layer = two.layer
    made = [[plan_engine(MODEL, capture_model(one, inputs).modules[MODEL], inputs, {})] for one in (two, three)]
    with pytest.raises(PassError, match="a number that is -2 and -3 by size, and no axis is"):
        share_plans(made, compare=True)


def test_tables_of_the_same_shape_may_differ_too(layers):
    shared = share_plans([plans(6, layers), plans(6, layers, kind="cos")], compare=True)
    assert shared.axes == ({}, {})
    assert [len(tables) for tables in shared.tables] == [1, 1]
