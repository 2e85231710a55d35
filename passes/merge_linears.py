"""One wide matrix product for many narrow ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, fetch
from cachec.runtime.abi import PROLOGUE

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeLinears(GraphPass):
    """In the prologue: linear layers on the same value whose results lie side by side become one layer.

    All modulations of a diffusion transformer are such: one product per request instead of one per block.
    """

    name: ClassVar[str] = "merge_linears"
    only: ClassVar[tuple[str, ...]] = (PROLOGUE,)

    def edit(self, module: fx.GraphModule) -> int:
        changes = 0
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is aten.cat.default and list(node.args[1:]) in ([1], [-1]):
                runs = _runs(node.args[0])
                if any(len(run) > 1 for run in runs):
                    node.args = ([_merged(module, run) if len(run) > 1 else run[0] for run in runs], node.args[1])
                    changes += sum(len(run) - 1 for run in runs)
        return changes


def _runs(values: list[fx.Node]) -> list[list[fx.Node]]:
    """Neighbours that may be merged, together."""
    runs: list[list[fx.Node]] = []
    for value in values:
        if runs and _is_linear(value) and _is_linear(runs[-1][-1]) and value.args[0] is runs[-1][-1].args[0]:
            runs[-1].append(value)
        else:
            runs.append([value])
    return runs


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is aten.linear.default and len(node.args) == 3 and len(node.users) == 1


def _argument(node: fx.Node, place: int) -> fx.Node:
    argument = node.args[place]
    assert isinstance(argument, fx.Node)
    return argument


def _merged(module: fx.GraphModule, run: list[fx.Node]) -> fx.Node:
    """The linear layer with the weights [sum of out, in] and biases of all."""
    graph = module.graph
    names = []
    for place, kind in ((1, "weight"), (2, "bias")):
        tensors = [fetch(module, str(_argument(node, place).target)) for node in run]
        name = f"merged_{run[0].name}_{kind}"
        module.register_buffer(name, torch.cat([tensor.detach() for tensor in tensors]))
        names.append(name)
    with graph.inserting_before(next(iter(run[-1].users))):
        weight, bias = (graph.get_attr(name) for name in names)
        new = graph.call_function(aten.linear.default, (run[0].args[0], weight, bias))
    new.meta = {k: v for k, v in run[0].meta.items() if k != "val"}
    return new
