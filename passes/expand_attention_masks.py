"""Give attention masks their full number of query rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, emit

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class ExpandAttentionMasks(GraphPass):
    """Expand a mask ``[B, 1 or heads, 1, K]`` to ``[B, 1 or heads, Q, K]``.

    ONNX Runtime's CPU Attention (opset 23) does not broadcast over queries.
    """

    name: ClassVar[str] = "expand_attention_masks"

    def edit(self, module: fx.GraphModule) -> int:
        count = 0
        for node in module.graph.nodes:
            mask = _mask(node) if node.target == _ATTENTION else None
            if mask is None or mask.meta["val"].shape[-2] != 1 or node.args[0].meta["val"].shape[-2] == 1:
                continue
            queries = node.args[0].meta["val"].shape[-2]
            with module.graph.inserting_before(node):
                sizes = [*([-1] * (mask.meta["val"].dim() - 2)), queries, -1]
                full = emit(mask, torch.ops.aten.expand.default, mask, sizes)
            node.replace_input_with(mask, full)
            count += 1
        return count


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None
