"""A program that is in its final operators, which ``torch.onnx`` is given as it is.

``torch.onnx.export`` would decompose it, and run every operator on fake tensors to write out which types are promoted. Here the
values that the nodes have already tell it.
"""

import copy
import functools
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx import traceback
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.fx.passes import type_promotion


def traced(program: ExportedProgram) -> ExportedProgram:
    """A copy of a program, which shares its weights, with promotions of types as nodes of their own."""
    copied = ExportedProgram(
        root=nn.Module(),
        graph=copy.deepcopy(program.graph),
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )
    values = [node.meta.get("val") for node in copied.graph.nodes if node.op == "placeholder"]
    (mode,) = {value.fake_mode for value in values if hasattr(value, "fake_mode")}
    with mode, traceback.preserve_node_meta():
        _Promotion(copied.graph_module, _rules()).run(*values)
    _fx_passes.remove_assertion_nodes(copied.graph_module)
    return copied


class _Promotion(type_promotion._TypePromotionInterpreter):
    """Runs only what it changes."""

    def run_node(self, node: fx.Node) -> Any:
        with self._set_current_node(node):
            if (rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table)) is not None:
                self._maybe_promote_node(node, rule)
        return node.meta["val"] if node.op == "call_function" else fx.Interpreter.run_node(self, node)


@functools.cache
def _rules() -> type_promotion.TypePromotionTable:
    return type_promotion.TypePromotionTable()
