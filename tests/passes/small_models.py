"""Small models around one operator each, and what a canonical pass keeps to on them."""

import torch
from torch import nn
from toy import TOKENS, WIDTH

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import run_passes
from cachec.runtime.abi import MODEL


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


BODIES = (squeeze, rotate, rotate_from_left, type_as, fill_true, fill_false, attend, constants)


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


def rewrites_once_and_keeps_the_result_exactly(one, body, gone, present):
    """``gone``: an operator that is not there any more, ``present``: one that there are more of; None: none is looked at."""
    before = capture(body)
    after, changed = run_one(before, one)
    assert changed
    assert gone is None or (gone in targets(before) and gone not in targets(after))
    assert present is None or (present in targets(after) and targets(after).count(present) > targets(before).count(present))
    expect_equal(after, body)
    again, changed = run_one(after, one)
    assert not changed
    assert again is after


def leaves_its_input_alone(one, body, gone):
    before = capture(body)
    listed = targets(before)
    run_one(before, one)
    assert targets(before) == listed
    assert gone is None or gone in listed
    expect_equal(before, body)


def says_that_there_is_nothing_to_do(one):
    before = capture(lambda tiny, x, y: x + y)
    after, changed = run_one(before, one)
    assert not changed
    assert after is before
