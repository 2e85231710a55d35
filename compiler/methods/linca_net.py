"""LinCa's invertible network (arXiv 2608.17973), and the coding that it makes.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels.
"""

from collections.abc import Mapping, Sequence
from typing import cast as typed

import numpy as np
import torch
from torch import nn

from cachec.compiler.graphs.coding import Coding, cast
from cachec.passes import Groups
from cachec.runtime.specs import Array


class Coupling(nn.Module):
    """Two halves of the channels: a += scale_F F(b), then b += scale_G G(a); each undoes itself exactly."""

    def __init__(self, half: int, hidden: int) -> None:
        super().__init__()
        self.F, self.G = _mlp(half, hidden), _mlp(half, hidden)
        self.scale_F, self.scale_G = (nn.Parameter(torch.tensor(0.1)) for _ in range(2))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = a + self.scale_F * self.F(b)
        return a, b + self.scale_G * self.G(a)

    def inverse(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = b - self.scale_G * self.G(a)
        return a - self.scale_F * self.F(b), b


def _mlp(half: int, hidden: int) -> nn.Sequential:
    """Places 2 and 5 are the authors' dropout, which is for training only. The last layer begins at zero."""
    last = nn.Linear(hidden, half)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    layers = (nn.Linear(half, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, hidden), nn.GELU(), nn.Identity(), last)
    return nn.Sequential(*layers)


class Mixing(nn.Module):
    """A square matrix over the channels, which begins orthogonal and near to one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        q, r = torch.linalg.qr(torch.eye(channels) + 0.01 * torch.randn(channels, channels))
        self.weight = nn.Parameter((q * torch.sign(torch.diag(r))).contiguous())  # a factorisation lies column by column

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight)


class Block(nn.Module):
    """Mixing, then coupling."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1x1, self.revnet = Mixing(channels), Coupling(channels // 2, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.conv1x1(x).chunk(2, -1)
        return torch.cat(self.revnet(a, b), -1)

    def inverse(self, z: torch.Tensor, unmix: torch.Tensor) -> torch.Tensor:
        """``unmix``: the inverse of the mixing matrix."""
        a, b = z.chunk(2, -1)
        return torch.matmul(torch.cat(self.revnet.inverse(a, b), -1), unmix)


class InvertibleNet(nn.Module):
    """A chain of blocks on [B, L, D]; names of parameters are those of the released weights."""

    def __init__(self, channels: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, hidden) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def inverse(self, z: torch.Tensor, unmix: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """``unmix``: the inverses of all mixing matrices, if they are known."""
        blocks = typed("list[Block]", list(self.blocks))
        known = unmix or [torch.linalg.inv(block.conv1x1.weight) for block in blocks]
        for block, matrix in zip(reversed(blocks), reversed(known), strict=True):
            z = block.inverse(z, matrix)
        return z


def net_of(arrays: Mapping[str, Array]) -> InvertibleNet:
    """The network with these parameters, by the released names (``net.blocks.0.conv1x1.weight`` …).

    Raises:
        RuntimeError, LookupError, ValueError: they are not those of one.
    """
    blocks = 1 + max(int(name.split(".")[2]) for name in arrays)
    channels, hidden = len(arrays["net.blocks.0.conv1x1.weight"]), len(arrays["net.blocks.0.revnet.F.0.bias"])
    net = InvertibleNet(channels, blocks, hidden)
    net.load_state_dict({name.removeprefix("net."): torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return net.eval()


def shapes_of(channels: int, blocks: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Released names, with shapes."""
    with torch.device("meta"):
        states = InvertibleNet(2, 1, hidden).state_dict()
    shapes = dict[str, tuple[int, ...]]()
    for name, value in states.items():
        sides = {1: channels // 2, 2: channels} if "revnet" not in name else {1: channels // 2}
        shape = tuple(sides.get(int(size), int(size)) for size in value.shape) if value.ndim else ()
        shapes |= {f"net.{name.replace('blocks.0', f'blocks.{block}')}": shape for block in range(blocks)}
    return shapes


def invertible_coding(nets: Sequence[InvertibleNet], split: Sequence[int]) -> Coding:
    """The codes of all networks side by side, each in groups of ``split`` channels; behind them a channel of ones for each.

    With one network there are no ones. With several, the forecast of a step weighs the groups of its own network, and the ones
    of that alone: they say which network decodes.
    """
    num = len(nets)
    gates = [] if num == 1 else [1] * num
    return Coding(_Encode(nets), _Decode(nets), Groups((*list(split) * num, *gates), 2))


class _Encode(nn.Module):
    def __init__(self, nets: Sequence[InvertibleNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        wide = cast(feature, torch.float32)
        parts = [net(wide) for net in self.nets]
        if len(parts) > 1:
            parts.append(torch.ones_like(wide[..., : len(parts)]))
        return cast(torch.cat(parts, -1), feature.dtype)


class _Decode(nn.Module):
    """Inverses of mixing matrices are made ahead."""

    def __init__(self, nets: Sequence[InvertibleNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.channels = len(typed("Block", nets[0].blocks[0]).conv1x1.weight)
        self.unmix = nn.ParameterList(
            torch.linalg.inv(typed("Block", block).conv1x1.weight.detach().double()).float().contiguous()
            for net in nets
            for block in net.blocks
        )

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        wide = cast(code, torch.float32)
        nets = typed("list[InvertibleNet]", list(self.nets))
        depth, total = len(self.unmix) // len(nets), None
        for number, net in enumerate(nets):
            z = wide.narrow(-1, number * self.channels, self.channels)
            feature = net.inverse(z, list(self.unmix)[number * depth : (number + 1) * depth])
            if len(nets) > 1:
                feature = feature * wide.narrow(-1, len(nets) * self.channels + number, 1)
            total = feature if total is None else total + feature
        assert total is not None, "there is a network"
        return cast(total, code.dtype)
