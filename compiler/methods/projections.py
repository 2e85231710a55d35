"""Codings that are fixed projections: a feature's part in a subspace apart from the rest.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``r`` dimensions of the subspace.
"""

import numpy as np
import torch
from torch import nn

from cachec.compiler.graphs.coding import Coding, cast
from cachec.passes import Groups
from cachec.runtime.specs import Array

TOKENS, CHANNELS = 1, 2  # axes of a feature [B, L, D]


def token_bands(basis: Array) -> Coding:
    """``[U F; F - U^T U F]`` along the tokens, of orthonormal rows ``basis`` U [r, L]. Two groups: the subspace, the rest."""
    return _bands(basis, TOKENS)


def channel_bands(basis: Array) -> Coding:
    """``[F V^T, F - F V^T V]`` along the channels, of orthonormal rows ``basis`` V [r, D]."""
    return _bands(basis, CHANNELS)


def channel_groups(labels: Array) -> Coding:
    """Channels in the order of their ``labels`` [D], 0 … G - 1: a group for each."""
    order = np.argsort(labels, kind="stable")
    return Coding(_Reorder(order), _Reorder(np.argsort(order)), Groups(tuple(map(int, np.bincount(labels))), CHANNELS))


def _bands(basis: Array, axis: int) -> Coding:
    rows = torch.from_numpy(basis.copy()).float()
    return Coding(_Split(rows, axis), _Join(rows, axis), Groups(tuple(map(int, rows.shape)), axis))


class _Join(nn.Module):
    """Multiplies in float32, whatever comes in; the bases are buffers, for they may depend on the size.

    Coordinates are divided by the root of the length, which makes that of a constant wave the mean: float16 can hold them.
    """

    def __init__(self, rows: torch.Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("back", (rows * rows.shape[1] ** 0.5).T.contiguous())
        self.axis, self.rank = axis, len(rows)

    back: torch.Tensor

    def up(self, coordinates: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.back, coordinates) if self.axis == TOKENS else torch.matmul(coordinates, self.back.T)

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        wide = cast(code, torch.float32)
        low = wide.narrow(self.axis, 0, self.rank)
        rest = wide.narrow(self.axis, self.rank, wide.shape[self.axis] - self.rank)
        return cast(rest + self.up(low), code.dtype)


class _Split(_Join):
    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, axis: int) -> None:
        super().__init__(rows, axis)
        self.register_buffer("rows", rows / rows.shape[1] ** 0.5)

    def down(self, value: torch.Tensor) -> torch.Tensor:
        """The coordinates of what ``value`` has in the subspace."""
        return torch.matmul(self.rows, value) if self.axis == TOKENS else torch.matmul(value, self.rows.T)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        wide = cast(feature, torch.float32)
        low = self.down(wide)
        return cast(torch.cat([low, wide - self.up(low)], self.axis), feature.dtype)


class _Reorder(nn.Module):
    """Channels by their numbers."""

    order: torch.Tensor

    def __init__(self, order: Array) -> None:
        super().__init__()
        self.register_buffer("order", torch.from_numpy(order.astype(np.int64)))

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return torch.index_select(feature, -1, self.order)
