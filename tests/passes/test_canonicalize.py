import pytest
import torch
from torch import nn
from toy import TOKENS, WIDTH

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import (
    Decomplexify,
    DropAsserts,
    ExpandAttentionMasks,
    FoldConstants,
    ReplaceTypeAs,
    RewriteBoolMaskedFill,
    SimplifyShapes,
    canonical_passes,
    run_passes,
)
from cachec.passes.base import depends_on_inputs
from cachec.runtime.abi import MODEL
from cachec.runtime.errors import PassError

aten = torch.ops.aten


def make_inputs(batch=2):
    generator = torch.Generator().manual_seed(batch)
    return {name: torch.randn(batch, TOKENS, WIDTH, generator=generator) for name in ("x", "y")}


class Tiny(nn.Module):
    """A linear map behind ``body``, so that there is a parameter."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("positions", torch.arange(TOKENS).float()[:, None])
        angles = torch.arange(TOKENS * WIDTH / 2).reshape(TOKENS, WIDTH // 2)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles))
        self.body = body

    def forward(self, x, y):
        return self.out(self.body(self, x, y))


def as_complex(x):
    return torch.view_as_complex(x.reshape(-1, TOKENS, WIDTH // 2, 2))


def rotate(tiny, x, y):
    return torch.view_as_real(as_complex(x) * tiny.rotation).flatten(2) + y


def rotate_from_left(tiny, x, y):
    return torch.view_as_real(tiny.rotation * as_complex(x)).flatten(2) + y


def squeeze(tiny, x, y):
    return x.squeeze(1) * y


def type_as(tiny, x, y):
    return x.type_as(y.double()).sin().float()


def fill_true(tiny, x, y):
    return (x > 0).masked_fill(y > 0, value=True).float()


def fill_false(tiny, x, y):
    return (x > 0).masked_fill(y > 0, value=False).float()


def attend(tiny, x, y):
    mask = y[:, None, None, :, 0] > -0.5
    mask = mask | (tiny.positions[:, 0] == 0)  # at least one key is seen
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], y[:, None], attn_mask=mask)[:, 0]


def constants(tiny, x, y):
    return x * torch.sin(tiny.positions / 3) + torch.cos(tiny.positions) + y


def capture(body):
    return capture_model(Tiny(body).eval(), make_inputs())


def targets(graphs):
    return [node.target for node in graphs.modules[MODEL].graph.nodes]


def run_one(graphs, one):
    changed = []
    graphs = run_passes(graphs, [one], observers=[lambda index, one, result: changed.append(result.changed)])
    return graphs, changed[0]


def expect_equal(graphs, body):
    for batch in (1, 2, 5):
        with torch.no_grad():
            wanted = Tiny(body)(**make_inputs(batch))
            assert torch.equal(graphs.modules[MODEL](**make_inputs(batch))["velocity"], wanted)


REWRITES = [
    (DropAsserts(), squeeze, aten._assert_tensor_metadata.default, None),
    (Decomplexify(), rotate, aten.view_as_complex.default, aten.stack.default),
    (Decomplexify(), rotate_from_left, aten.view_as_complex.default, aten.stack.default),
    (SimplifyShapes(), squeeze, aten.squeeze.dim, None),
    (ReplaceTypeAs(), type_as, aten.type_as.default, None),
    (RewriteBoolMaskedFill(), fill_true, aten.masked_fill.Scalar, aten.logical_or.default),
    (RewriteBoolMaskedFill(), fill_false, aten.masked_fill.Scalar, aten.logical_and.default),
    (ExpandAttentionMasks(), attend, None, aten.expand.default),
    (FoldConstants(), constants, aten.sin.default, "constant_0"),
]
IDS = [f"{one.name}-{body.__name__}" for one, body, _, _ in REWRITES]


@pytest.mark.parametrize(("one", "body", "gone", "present"), REWRITES, ids=IDS)
def test_a_pass_rewrites_once_and_keeps_the_result_exactly(one, body, gone, present):
    before = capture(body)
    after, changed = run_one(before, one)
    assert changed
    assert gone is None or (gone in targets(before) and gone not in targets(after))
    assert present is None or (present in targets(after) and targets(after).count(present) > targets(before).count(present))
    expect_equal(after, body)
    again, changed = run_one(after, one)
    assert not changed
    assert again is after


@pytest.mark.parametrize(("one", "body", "gone", "present"), REWRITES, ids=IDS)
def test_a_pass_leaves_its_input_alone(one, body, gone, present):
    before = capture(body)
    listed = targets(before)
    run_one(before, one)
    assert targets(before) == listed
    assert gone is None or gone in listed
    expect_equal(before, body)


@pytest.mark.parametrize(
    "one",
    [
        Decomplexify(),
        ReplaceTypeAs(),
        RewriteBoolMaskedFill(),
        ExpandAttentionMasks(),
        FoldConstants(),
    ],
    ids=lambda one: one.name,
)
def test_a_pass_with_nothing_to_do_says_so(one):
    before = capture(lambda tiny, x, y: x + y)
    after, changed = run_one(before, one)
    assert not changed
    assert after is before


@pytest.mark.parametrize("body", [body for _, body, _, _ in REWRITES], ids=IDS)
def test_all_passes_together_keep_the_result_exactly(body):
    expect_equal(run_passes(capture(body), [canonical_passes()]), body)


def test_no_complex_value_depends_on_an_input_any_more():
    graphs, _ = run_one(capture(rotate), Decomplexify())
    assert not any(n.meta["val"].is_complex() for n in depends_on_inputs(graphs.modules[MODEL]) if has_tensor(n))


def has_tensor(node):
    return isinstance(node.meta.get("val"), torch.Tensor)


def test_folding_after_decomplexify_leaves_no_complex_value_in_the_graph():
    graphs = run_passes(capture(rotate), [canonical_passes()])
    assert not any(n.meta["val"].is_complex() for n in graphs.modules[MODEL].graph.nodes if has_tensor(n))


@pytest.mark.parametrize(
    "body",
    [
        lambda tiny, x, y: torch.view_as_real(as_complex(x) * as_complex(y)).flatten(2),
        lambda tiny, x, y: as_complex(x).abs().repeat(1, 1, 2),
    ],
    ids=["product of inputs", "absolute value"],
)
def test_other_complex_values_of_inputs_are_refused(body):
    with pytest.raises(PassError, match="decomplexify.*computes a complex number, which ONNX cannot express"):
        run_one(capture(body), Decomplexify())


def test_a_real_squeeze_stays():
    graphs, _ = run_one(capture(lambda tiny, x, y: x[:, None].squeeze(1) + y), SimplifyShapes())
    assert aten.squeeze.dim in targets(graphs)


def test_masked_fill_on_numbers_stays():
    graphs, changed = run_one(capture(lambda tiny, x, y: x.masked_fill(y > 0, 3.0)), RewriteBoolMaskedFill())
    assert not changed
    assert aten.masked_fill.Scalar in targets(graphs)


def test_the_cast_no_longer_depends_on_the_other_tensor():
    graphs = run_passes(capture(type_as), [DropAsserts(), ReplaceTypeAs(), SimplifyShapes()])
    y = next(n for n in graphs.modules[MODEL].graph.nodes if n.op == "placeholder" and n.target == "y")
    assert not y.users


def test_values_of_parameters_are_not_folded():
    graphs, changed = run_one(capture(lambda tiny, x, y: x + torch.sin(tiny.out.bias)), FoldConstants())
    assert not changed
    assert aten.sin.default in targets(graphs)


def test_folding_keeps_parameters_the_same_objects():
    tiny = Tiny(constants).eval()
    graphs, _ = run_one(capture_model(tiny, make_inputs()), FoldConstants())
    assert {id(p) for p in graphs.modules[MODEL].parameters()} == {id(p) for p in tiny.parameters()}
