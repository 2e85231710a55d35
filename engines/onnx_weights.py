"""Initializers of ONNX models: those in memory, and those that are read when their values are wanted."""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

if TYPE_CHECKING:
    from cachec.engines.onnx_files import NamedWeights


class LateWeight(onnx_ir.LazyTensor):  # type: ignore[misc]
    """A fake tensor of a program, perhaps with its axes permuted, as an initializer."""

    __slots__ = ("axes", "fake", "weights")

    def __init__(
        self,
        fake: torch.Tensor,
        weights: "NamedWeights",
        dtype: onnx_ir.DataType,
        name: str | None,
        axes: tuple[int, ...] | None = None,
    ) -> None:
        shape = fake.shape if axes is None else [fake.shape[axis] for axis in axes]
        super().__init__(self._read, dtype, onnx_ir.Shape(map(int, shape)), name=name)
        self.fake, self.weights, self.axes = fake, weights, axes

    def transposed(self, axes: Sequence[int]) -> "LateWeight":
        """With its axes permuted."""
        old = range(len(axes)) if self.axes is None else self.axes
        return LateWeight(self.fake, self.weights, self.dtype, None, tuple(old[axis] for axis in axes))

    @property
    def key(self) -> Hashable:
        """The same for the same values."""
        return self.weights.key(self.fake), self.axes

    def contents(self) -> Iterator[Any]:
        """The bytes, in pieces."""
        if self.axes is None:
            for piece in self.weights.pieces(self.fake):
                yield _bytes(piece)
        else:
            yield _bytes(self._value())

    def _value(self) -> torch.Tensor:
        pieces = list(self.weights.pieces(self.fake))
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole if self.axes is None else whole.permute(self.axes)

    def _read(self) -> TorchTensor:
        return TorchTensor(self._value().contiguous(), name=self.name)


def identity(tensor: Any) -> Hashable:
    """The same for initializers of the same values: what a weight is made of, or a hash of what is in memory."""
    if isinstance(tensor, LateWeight):
        return tensor.key
    digest = hashlib.sha256()
    for content in contents(tensor):
        digest.update(content)
    return digest.hexdigest()


def contents(tensor: Any) -> Iterator[Any]:
    """The bytes of an initializer, in pieces."""
    if isinstance(tensor, LateWeight):
        yield from tensor.contents()
    else:
        yield tensor.tobytes()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
