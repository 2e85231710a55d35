"""A program that is not taken apart any further."""

import torch
from engine_toys import layer

from cachec.engines.traced import TracedProgram


def test_a_decomposition_is_itself_and_shares_the_weights():
    module, plan = layer()
    traced = TracedProgram.of(plan.program)
    assert traced.run_decompositions({}) is traced
    assert traced.state_dict["layer.weight"].data_ptr() == module.layer.weight.data_ptr()
    x = torch.ones(3, 4)
    with torch.no_grad():
        assert torch.equal(traced.module()(x=x)["y"], module(x)["y"])


def test_its_graph_is_its_own():
    program = layer()[1].program
    before = str(program.graph)
    graph = TracedProgram.of(program).graph
    graph.create_node("placeholder", "more")
    assert str(program.graph) == before != str(graph)
