"""A program as ``torch.onnx`` is given it."""

import torch
from engine_toys import layer
from torch.onnx._internal.exporter import _fx_passes

from cachec.engines.traced import traced


def test_the_weights_are_shared_and_the_graph_is_a_copy():
    module, plan = layer()
    before = str(plan.program.graph)
    copied = traced(plan.program)
    assert copied.state_dict["layer.weight"].data_ptr() == module.layer.weight.data_ptr()
    copied.graph.create_node("placeholder", "more")
    assert str(plan.program.graph) == before != str(copied.graph)


def test_promotions_are_nodes_as_torch_writes_them():
    class Mixed(torch.nn.Module):
        def forward(self, x, y):
            return (x * y + 2) / 3 + y.float()

    program = torch.export.export(Mixed(), (torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.int64)), strict=False)
    wanted = torch.export.export(Mixed(), program.example_inputs[0], strict=False)
    _fx_passes.insert_type_promotion_nodes(wanted.graph_module)
    _fx_passes.remove_assertion_nodes(wanted.graph_module)
    found = traced(program)
    assert str(found.graph) == str(wanted.graph) != str(program.graph)
