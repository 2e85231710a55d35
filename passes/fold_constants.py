"""Compute once what depends on constants only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, depends_on_inputs, fetch

_PREFIX = "constant_"


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Replace the values that depend on no input and on no parameter by buffers.

    Those are rotary and position tables of the captured resolution, and masks. Values that depend on parameters stay, so
    that weights keep their identity. Equal tables become one buffer.
    """

    name: ClassVar[str] = "fold_constants"

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        constant = dict.fromkeys(_constant_nodes(module))
        called = [n for n in constant if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
        return [n for n in called if any(user not in constant for user in n.users)]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        values = _evaluate(module, _constant_nodes(module))
        buffers = {name: value for name, value in module.named_buffers() if name.startswith(_PREFIX)}
        for node in places:
            name = next((n for n, value in buffers.items() if _same(value, values[node])), None)
            if name is None:
                name = f"{_PREFIX}{len(buffers)}"
                buffers[name] = _alone(values[node])
                module.register_buffer(name, buffers[name], persistent=True)
            with module.graph.inserting_before(node):
                buffer = module.graph.get_attr(name)
                buffer.meta = dict(node.meta)
            node.replace_all_uses_with(buffer)


def _alone(value: torch.Tensor) -> torch.Tensor:
    """A part of a table without the table, which would be stored with it."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _is_tensors(value: object) -> bool:
    return all(isinstance(one, torch.Tensor) for one in (value if isinstance(value, list | tuple) else [value]))


def _constant_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes whose value is a tensor or some tensors, and depends on neither an input nor a parameter, in order."""
    varying = depends_on_inputs(module)
    constant: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node in varying or node.op == "output":
            continue
        if node.op == "get_attr":
            if not isinstance(fetch(module, node.target), torch.nn.Parameter):
                constant[node] = None
        elif _is_tensors(node.meta.get("val")) and all(a in constant for a in node.all_input_nodes):
            constant[node] = None
    return list(constant)


@torch.no_grad()
def _evaluate(module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    values: dict[fx.Node, torch.Tensor] = {}  # or some, of a node that splits one
    for node in nodes:
        if node.op == "get_attr":
            values[node] = fetch(module, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values
