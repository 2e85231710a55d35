"""Drop ``squeeze`` along an axis that is not of size one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass


@dataclass(frozen=True)
class DropNoopSqueezes(GraphPass):
    """PyTorch leaves such a squeeze without effect; ONNX shape inference rejects it. Symbolic sizes are never one."""

    name: ClassVar[str] = "drop_noop_squeezes"

    def edit(self, module: fx.GraphModule) -> int:
        squeezes = [n for n in module.graph.nodes if n.target == torch.ops.aten.squeeze.dim]
        idle = [n for n in squeezes if not _is_one(n.args[0].meta["val"].shape[n.args[1]])]
        for node in idle:
            node.replace_all_uses_with(node.args[0])
        return len(idle)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1
