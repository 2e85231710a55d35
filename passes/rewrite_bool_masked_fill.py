"""Write ``masked_fill`` on booleans as logic."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, emit

aten = torch.ops.aten


@dataclass(frozen=True)
class RewriteBoolMaskedFill(GraphPass):
    """Filling with True is ``x or mask``, with False ``x and not mask``. ONNX Runtime has no ``Where`` on booleans."""

    name: ClassVar[str] = "rewrite_bool_masked_fill"

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        fills = [n for n in module.graph.nodes if n.target == aten.masked_fill.Scalar]
        return [n for n in fills if n.args[0].meta["val"].dtype == torch.bool]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in places:
            source, mask, value = node.args
            with module.graph.inserting_before(node):
                if value:
                    new = emit(node, aten.logical_or.default, source, mask)
                else:
                    new = emit(node, aten.logical_and.default, source, emit(node, aten.logical_not.default, mask))
            node.replace_all_uses_with(new)
