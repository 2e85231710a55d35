"""What changes nothing goes; reshapes in a row become one."""

import torch
from small_models import capture, leaves_its_input_alone, rewrites_once_and_keeps_the_result_exactly, run_one, squeeze, targets
from torch import nn
from toy import TOKENS, WIDTH, example_inputs

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import DropAsserts, SimplifyShapes, run_passes
from cachec.runtime.abi import MODEL, VELOCITY

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.body = nn.Linear(WIDTH, WIDTH), body

    def forward(self, latents):
        return self.out(self.body(latents))


def simplified(body):
    """The operators that are left in front of the last layer, and whether the result is the same."""
    inputs = {"latents": example_inputs()["latents"]}
    before = capture_model(Model(body).eval(), inputs)
    after = run_passes(before, [DropAsserts(), SimplifyShapes()]).modules[MODEL]
    with torch.no_grad():
        assert torch.equal(after(**inputs)[VELOCITY], before.modules[MODEL](**inputs)[VELOCITY])
    return [node.target for node in after.graph.nodes if node.op == "call_function"][:-1]


def test_copies_casts_dropouts_and_whole_slices_go():
    def body(x):
        return nn.functional.dropout(x, 0.5, training=False).contiguous().clone().float()[:, :].squeeze(1)

    assert simplified(body) == []


def test_reshapes_that_undo_each_other_go_and_others_become_one():
    assert simplified(lambda x: x.flatten(1).unflatten(1, (TOKENS, WIDTH))) == []
    assert simplified(lambda x: x.flatten(1).reshape(-1, 2, 4).view(-1, 3, 16).reshape(-1, TOKENS, WIDTH).sin()) == [
        aten.sin.default
    ]
    made = simplified(lambda x: x.flatten(1).view(-1, 3, 2, WIDTH).sin().flatten(1, 2))
    assert made == [aten.reshape.default, aten.sin.default, aten.reshape.default]


def test_what_changes_something_stays():
    assert aten.expand.default in simplified(lambda x: x + x[:, :1].expand(-1, TOKENS, -1))
    assert aten.slice.Tensor in simplified(lambda x: x * x[:, :1])
    assert aten.to.dtype in simplified(lambda x: x.double().sin().float())


def test_it_rewrites_once_and_keeps_the_result_exactly():
    rewrites_once_and_keeps_the_result_exactly(SimplifyShapes(), squeeze, aten.squeeze.dim, None)


def test_it_leaves_its_input_alone():
    leaves_its_input_alone(SimplifyShapes(), squeeze, aten.squeeze.dim)


def test_a_real_squeeze_stays():
    graphs, _ = run_one(capture(lambda tiny, x, y: x[:, None].squeeze(1) + y), SimplifyShapes())
    assert aten.squeeze.dim in targets(graphs)
