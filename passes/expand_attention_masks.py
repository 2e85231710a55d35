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

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return [node for node in module.graph.nodes if node.target == _ATTENTION and _is_short(node)]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in places:
            mask = _mask(node)
            assert mask is not None  # as places() has seen
            with module.graph.inserting_before(node):
                sizes = [*([-1] * (mask.meta["val"].dim() - 2)), _num_queries(node), -1]
                full = emit(mask, torch.ops.aten.expand.default, mask, sizes)
            node.replace_input_with(mask, full)


def _is_short(node: fx.Node) -> bool:
    mask = _mask(node)
    return mask is not None and mask.meta["val"].shape[-2] == 1 and _num_queries(node) != 1


def _num_queries(node: fx.Node) -> int:
    return int(node.args[0].meta["val"].shape[-2])  # type: ignore[union-attr]


def _mask(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None
