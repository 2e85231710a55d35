"""Programs of rewritten graphs, made without tracing them again."""

import pytest
import torch
from torch.utils import _pytree as pytree
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import IO, STEPS

from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.exported import export_program
from cachec.compiler.graphs.prepare import engine, linear
from cachec.passes.base import copy_module, placeholders
from cachec.runtime.abi import ADVANCE, BATCH, COMPUTE
from cachec.runtime.errors import PassError


@pytest.fixture(scope="module")
def graphs(toy_split):
    return engine(linear(toy_split), IO)


@torch.no_grad()
def test_programs_are_the_graphs_and_keep_their_sizes_open(graphs):
    for plan in plan_engines(graphs, example_inputs(), "latents", STEPS):
        module, inputs = graphs.modules[plan.name], plan.program.example_inputs[1]
        again = plan.program.module()
        assert {id(value) for value in plan.program.state_dict.values()} == {
            id(v) for v in module.state_dict(keep_vars=True).values()
        }
        wanted, got = module(**inputs), again(**inputs)
        assert list(got) == list(wanted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    five = {"latents": torch.randn(5, TOKENS, WIDTH), "delta": torch.randn(5), "step_values": torch.randn(5, 56)}
    (compute,) = [p for p in plan_engines(graphs, example_inputs(), "latents", STEPS) if p.name == COMPUTE]
    assert compute.program.module()(**five)["velocity"].shape == (5, TOKENS, WIDTH)


def test_values_of_the_capture_are_those_that_the_graph_gives_with_the_symbols_of_its_program(graphs):
    module = copy_module(graphs.modules[COMPUTE])
    (known,) = [plan.program for plan in plan_engines(graphs, example_inputs(), "latents", STEPS) if plan.name == COMPUTE]
    for node in placeholders(module).values():
        node.meta.pop("val")  # so that every value is made anew
    given = known.example_inputs[1]
    made = export_program(module, given, dict.fromkeys(given, (BATCH,)))
    values = [[str(pytree.tree_map(_facts, node.meta["val"])) for node in one.graph.nodes if "val" in node.meta]
              for one in (known, made)]  # fmt: skip
    assert values[0] == values[1]
    assert known.range_constraints.keys() == made.range_constraints.keys()


def _facts(value):
    return (list(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def test_a_graph_that_fixes_an_open_size_is_refused(graphs):
    module = graphs.modules[ADVANCE]
    given = {name: torch.ones(1) for name in placeholders(module)}
    with pytest.raises(PassError, match="the graph cannot be exported"):
        export_program(module, given, dict.fromkeys(given, ()))
