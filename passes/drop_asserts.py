"""Drop what only checks: asserts on tensor metadata and on values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass

ASSERTS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


@dataclass(frozen=True)
class DropAsserts(GraphPass):
    """Remove assert nodes. Nothing may use their result, so removal changes no value."""

    name: ClassVar[str] = "drop_asserts"

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return [node for node in module.graph.nodes if node.target in ASSERTS]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in reversed(places):
            module.graph.erase_node(node)
