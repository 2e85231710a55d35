"""Equal parts of graphs become one."""

import torch
from toy import example_inputs
from toy_runs import HOIST, TIMES, run_prologue

from cachec.passes import ShareSubexpressions, run_passes
from cachec.runtime.abi import PROLOGUE


@torch.no_grad()
def test_equal_parts_of_several_graphs_are_computed_once(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    shared = run_passes(hoisted, [ShareSubexpressions()])
    count = [sum(n.op == "call_function" for n in g.modules[PROLOGUE].graph.nodes) for g in (hoisted, shared)]
    assert count[1] < count[0]
    inputs = example_inputs()
    for name, value in run_prologue(hoisted, inputs["prompt"], TIMES).items():
        assert torch.equal(run_prologue(shared, inputs["prompt"], TIMES)[name], value)
