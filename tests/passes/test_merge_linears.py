"""Linear layers on one value become one."""

import operator

import torch
from torch import nn
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import split
from toy_runs import HOIST, TIMES, run_prologue

from cachec.passes import MergeLinears, run_passes
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE

aten = torch.ops.aten


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, size) for size in (WIDTH, WIDTH, 2 * WIDTH))
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        mixed = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.out(mixed) * self.gate(x)


class Model(nn.Module):
    """A body with three layers on one value, and one more without a bias; a tail whose layer the body uses, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body, self.tail = Body(), nn.Linear(WIDTH, WIDTH)

    def forward(self, latents):
        return self.tail(self.body(self.first(latents) + self.tail(latents) * self.second(latents)))


def linears(module):
    return [node for node in module.graph.nodes if node.target is aten.linear.default]


@torch.no_grad()
def test_queries_keys_and_values_are_one_product():
    inputs = {"latents": example_inputs()["latents"]}
    before = split(Model().eval(), inputs, "body")
    after = run_passes(before, [MergeLinears()])
    compute = after.modules[COMPUTE]
    assert len(linears(before.modules[COMPUTE])) == 9
    assert len(linears(compute)) == 6  # q, k, v are one, and first and second; the gate has no bias, the tail's is shared
    (wide,) = [node for node in linears(compute) if node.meta["val"].shape[-1] == 4 * WIDTH]
    (cuts,) = wide.users
    assert cuts.args[1] == [WIDTH, WIDTH, 2 * WIDTH]
    assert all(user.target is operator.getitem for user in cuts.users)
    for name, value in before.modules[COMPUTE](**inputs).items():
        torch.testing.assert_close(compute(**inputs)[name], value, rtol=1e-5, atol=1e-5)
    shared = {id(p) for p in compute.parameters()}
    assert {id(p) for p in after.modules[FORECAST].parameters()} <= shared
    assert not any(name.startswith("model.body.q") for name in compute.state_dict())  # no second copy of what was merged
    assert wide.meta["val"].shape[1:] == (TOKENS, 4 * WIDTH)


def test_weights_that_are_values_stay():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.body, self.out = nn.Parameter(torch.ones(WIDTH, WIDTH)), nn.Identity(), nn.Linear(WIDTH, WIDTH)

        def forward(self, latents):
            one = nn.functional.linear(latents, self.weight * 2)
            return self.out(self.body(one + nn.functional.linear(latents, self.weight.exp())) + 1)

    inputs = {"latents": example_inputs()["latents"]}
    from cachec.compiler.graphs.capture import capture_model

    captured = capture_model(Computed().eval(), inputs)
    assert run_passes(captured, [MergeLinears()]) is captured


@torch.no_grad()
def test_neighbouring_linears_become_one(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    merged = run_passes(hoisted, [MergeLinears()])
    linear = torch.ops.aten.linear.default
    count = [sum(n.target is linear for n in g.modules[PROLOGUE].graph.nodes) for g in (hoisted, merged)]
    assert count[1] < count[0]
    inputs = example_inputs()
    for name, value in run_prologue(hoisted, inputs["prompt"], TIMES).items():
        torch.testing.assert_close(run_prologue(merged, inputs["prompt"], TIMES)[name], value, atol=1e-6, rtol=1e-6)
