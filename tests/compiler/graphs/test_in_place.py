"""Writes in place become functional on the captured graph, without tracing it once more."""

import logging

import pytest
import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.in_place import UnknownWriteError, is_functional, replace_writes
from cachec.runtime.abi import MODEL, VELOCITY

TOKENS, WIDTH = 4, 6


def whole(x):
    y = x * 2
    return y.div_(3) + y


def slices(x):
    y = torch.empty_like(x)
    y[..., 0::2], y[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return y


def halves_swapped(x):
    y = x * 2
    y[..., 0::2], y[..., 1::2] = -y[..., 1::2], y[..., 0::2]  # the second reads what the first wrote
    return y


def selected(x):
    mask = (x > 0) & (x < 1)
    mask[:, :, 0] = True
    mask[:, -1:].zero_()
    return x.masked_fill(mask, -1.0)


def nested(x):
    y = x.transpose(1, 2).contiguous()
    y.transpose(1, 2).unsqueeze(1)[:, 0, 1:].permute(2, 0, -2 + 3).reshape(WIDTH, -1, TOKENS - 1)[::2].mul_(x[0, 0, 0])
    return y


def taken_apart(x):
    y = x + 1
    first, second = y.chunk(2, dim=-1)
    second.add_(first)
    y.unbind(1)[2].copy_(y.split([1, 5], -1)[0][:, 0])  # one number into a row
    return y


def aliases(x):
    y = x * 2
    before = y.view(-1, WIDTH)
    kept = before + 0
    same = y.to(x.dtype)
    y.transpose(1, 2)[0].add_(1)
    after = y.flatten(1)
    return kept.view_as(y) * before.view_as(y) + after.view_as(y) + nn.functional.dropout(same, 0.5, training=False)


def twice(x):
    y = x * 2
    view = y[:, 1:]
    view.mul_(3).add_(x[:, 1:])[..., 0] = 5
    y[:, 2] = view[:, 0]
    same = view.to(x.dtype)
    same[:, 1].neg_()
    same.mul_(y[:, :1])
    return y - view.sum()


def copying_reshape(x):
    y = x * 2
    flat = y.transpose(1, 2).reshape(-1, WIDTH * TOKENS)  # a copy
    flat.zero_()
    return y + flat.view_as(y)


def other_layout(x):
    y = x * 2
    y.copy_(x.transpose(1, 2).reshape(-1, WIDTH, TOKENS).transpose(1, 2))
    return y.view(-1, TOKENS * WIDTH // 2, 2)


def other_types(x):
    y, count = (x * 2).half(), torch.arange(WIDTH)
    y[:, 0] = count
    y += x  # in float32, rounded
    count &= 3
    return y.float() + count


def indexed(x):
    y, constant = x * 2, torch.tensor([1.0, 2.0])
    constant[0] = 5
    y[:, torch.tensor([2, 0])] = x[:, :2]
    y[x > 0] = 7
    return y.clamp_(max=6) + constant.sum()


UNDERSTOOD = [
    *(whole, slices, halves_swapped, selected, nested, taken_apart, aliases, twice, copying_reshape, other_layout, other_types),
    indexed,
]


def diagonal(x):
    y = x @ x.transpose(1, 2)
    y.diagonal(dim1=1, dim2=2).zero_()
    return y


def an_input(x):
    x.view(-1)[1:].mul_(1.0)
    return x * 2


def another_shape(x):
    table = torch.arange(WIDTH) * 1.0
    return x + table.unsqueeze_(0)


class Model(nn.Module):
    def __init__(self, *functions):
        super().__init__()
        self.functions, self.bias = functions, nn.Parameter(torch.zeros(()))

    def forward(self, latents):
        return tuple(function(latents) + self.bias for function in self.functions)


def captured(model):
    names = [function.__name__ for function in model.functions]
    graphs = capture_model(model.eval(), {"latents": torch.randn(2, TOKENS, WIDTH)}, more=tuple(names[1:]))
    return graphs.modules[MODEL]


@torch.no_grad()
def test_writes_become_values_without_another_trace(caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="cachec"):
        module = captured(model := Model(*UNDERSTOOD))
    assert not [record for record in caplog.records if record.name.startswith("cachec")]
    assert all(map(is_functional, module.graph.nodes))
    for batch in (1, 3):
        latents = torch.randn(batch, TOKENS, WIDTH)
        got = module(latents=latents).values()
        for function, one, wanted in zip(UNDERSTOOD, got, model(latents), strict=True):
            assert torch.equal(one, wanted), function.__name__


@torch.no_grad()
def test_what_is_not_understood_is_traced_once_more_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="cachec"):
        module = captured(model := Model(diagonal))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cachec")]
    assert said.startswith("traced once more, since")
    assert all(map(is_functional, module.graph.nodes))
    latents = torch.randn(3, TOKENS, WIDTH)
    assert torch.equal(module(latents=latents)[VELOCITY], model(latents)[0])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (diagonal, "writes through aten.diagonal"),
        (an_input, "placeholder latents is written into"),
        (another_shape, r"unsqueeze_ \(.*\) has no functional form"),
    ],
)
def test_what_is_not_understood_is_refused(function, why):
    program = torch.export.export(Model(function), (torch.randn(2, TOKENS, WIDTH),), strict=False)
    with pytest.raises(UnknownWriteError, match=why):
        replace_writes(program.module(check_guards=False))
