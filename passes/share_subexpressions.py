"""Compute equal things once."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, fetch
from cachec.runtime.abi import PROLOGUE


@dataclass(frozen=True)
class ShareSubexpressions(GraphPass):
    """In the prologue: calls of the same operator on the same values become one. Its parts come from several graphs."""

    name: ClassVar[str] = "share_subexpressions"
    only: ClassVar[tuple[str, ...]] = (PROLOGUE,)

    def edit(self, module: fx.GraphModule) -> int:
        seen: dict[Any, fx.Node] = {}
        changes = 0
        for node in list(module.graph.nodes):
            if node.op in ("placeholder", "output"):
                continue
            key = _constant_key(fetch(module, str(node.target))) if node.op == "get_attr" else _call_key(node)
            if key not in seen:
                seen[key] = node
                continue
            node.replace_all_uses_with(seen[key])
            module.graph.erase_node(node)
            changes += 1
        return changes


def _call_key(node: fx.Node) -> Any:
    return (node.target, _hashable(node.args), _hashable(node.kwargs))


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((name, _hashable(entry)) for name, entry in value.items())
    return (type(value), value)  # 1, 1.0 and True are equal, and not the same argument


def _constant_key(value: torch.Tensor) -> Any:
    """The same tensor, or a table with the same numbers."""
    if isinstance(value, torch.nn.Parameter):
        return ("parameter", id(value))
    return ("table", value.dtype, tuple(value.shape), value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
