"""How features are kept: in a code, of which forecasts weigh parts on their own.

The general forecast is ``decode(sum over slots of C[step, group, slot] * encode(feature of the slot))``. ``encode`` stands in
the compute graph, behind the cut, and runs once for every feature that is kept; ``decode`` stands in the forecast graph, in
front of the tail. What a coding knows of the size is in buffers of its modules: of a bundle for several sizes those become
tables that are stored with each.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from cachec.compiler.graphs.capture import capture_map
from cachec.passes import Groups
from cachec.passes.base import CAST


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of another type, in the form that every back end has; nothing at all where it has that type."""
    return value if value.dtype == dtype else CAST(value, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Coding:
    """``encode`` [B, L, D] to the code [B, …], whose ``groups`` have weights of their own, and ``decode`` back.

    Both take and give the feature's own type; they may compute in another. ``decode(encode(F))`` is F, up to rounding.
    """

    encode: nn.Module
    decode: nn.Module
    groups: Groups

    def on(self, device: torch.device) -> "Coding":
        """The same there."""
        return replace(self, encode=copy.deepcopy(self.encode).to(device), decode=copy.deepcopy(self.decode).to(device))

    def capture(self, feature: torch.Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Both as graphs, for features like ``feature`` [B, L, D]."""
        example = torch.zeros((2, *map(int, feature.shape[1:])), dtype=feature.dtype, device=feature.device)
        there = self.on(example.device)
        with torch.no_grad():
            code = there.encode(example)
        return capture_map(there.encode, example), capture_map(there.decode, code)
