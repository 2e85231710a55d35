"""Compute equal things once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses import FakeTensor

from cachec.passes.base import GraphPass, fetch
from cachec.runtime.abi import PROLOGUE


@dataclass(frozen=True)
class ShareSubexpressions(GraphPass):
    """In the prologue: calls of the same operator on the same values become one. Its parts come from several graphs."""

    name: ClassVar[str] = "share_subexpressions"
    only: ClassVar[tuple[str, ...]] = (PROLOGUE,)

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return list(_repeated(module))

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node, first in _repeated(module).items():
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _repeated(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Nodes that give what an earlier one gives, and which."""
    seen: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        key = _constant_key(fetch(module, str(node.target))) if node.op == "get_attr" else _call_key(node, same)
        first = seen.setdefault(key, node)
        if first is not node:
            same[node] = first
    return same


def _call_key(node: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Any:
    return (node.target, _hashable(node.args, same), _hashable(node.kwargs, same))


def _hashable(value: Any, same: Mapping[fx.Node, fx.Node]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(entry, same) for entry in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(entry, same)) for name, entry in value.items())
    if isinstance(value, fx.Node):
        return same.get(value, value)
    return (type(value), value)  # 1, 1.0 and True are equal, and not the same argument


def _constant_key(value: torch.Tensor) -> Any:
    """The same tensor, or a table with the same numbers."""
    if isinstance(value, torch.nn.Parameter | FakeTensor):  # which has no numbers
        return ("parameter", id(value))
    return ("table", value.dtype, tuple(value.shape), value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
