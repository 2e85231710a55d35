"""Names, shapes and dtypes of what crosses an engine's border.

``B`` batch, ``H`` number of written features. A dimension is a fixed size, or the name of a symbolic one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachec.runtime.errors import BundleError, InputError, in_one_line, shortened

Array = NDArray[Any]
Dim = int | str
BFLOAT16 = "bfloat16"  # numpy has none: buffers of it belong to another library
DTYPES = (
    BFLOAT16,
    "float16",
    "float32",
    "float64",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its shape, with symbolic dimensions by name, and its dtype: numpy's name, or bfloat16."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    def __post_init__(self) -> None:
        itemsize(self.dtype)  # raises on a name that is no dtype

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with symbolic dimensions replaced by ``sizes``.

        Raises:
            BundleError: there are others.
        """
        if strange := [d for d in self.shape if isinstance(d, str) and d not in sizes]:
            raise BundleError(f"an engine has {shortened(self.name)} of size {shortened(strange[0])}, which is none of "
                              f"{', '.join(sizes)}: compile the bundle again")  # fmt: skip
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def check(self, value: Array, sizes: Mapping[str, int] | None = None) -> None:
        """Raise ``InputError`` unless ``value`` has this dtype and shape and holds only finite numbers."""
        if not isinstance(value, np.ndarray):
            raise InputError(f"input {self.name!r} is a {type(value).__name__}, expected a numpy array")
        self.check_form(value, sizes)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"input {self.name!r} holds NaN or infinity: check what made it")

    def check_form(self, value: Any, sizes: Mapping[str, int] | None = None) -> None:
        """Raise ``InputError`` unless an array, or a buffer of any device, has this dtype and shape."""
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != self.dtype:
            raise InputError(f"input {self.name!r} has dtype {dtype}, expected {self.dtype}: convert it first")
        wanted = self.at(sizes or {}).shape
        fits = len(value.shape) == len(wanted) and all(
            isinstance(want, str) or want == got for want, got in zip(wanted, value.shape, strict=True)
        )
        if not fits:
            raise InputError(f"input {self.name!r} has shape {list(value.shape)}, expected {list(wanted)}")

    def at(self, sizes: Mapping[str, int]) -> "TensorSpec":
        """With these symbolic dimensions as fixed sizes; others stay symbolic."""
        return TensorSpec(self.name, tuple(sizes.get(d, d) if isinstance(d, str) else d for d in self.shape), self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TensorSpec":
        if any(isinstance(size, int) and size < 0 for size in data["shape"]):
            name, shape = shortened(data["name"]), shortened(data["shape"])
            raise BundleError(f"an engine has {name} of shape {shape}, with a size below 0: compile the bundle again")
        if data["dtype"] not in DTYPES:
            name, dtype = shortened(data["name"]), shortened(data["dtype"])
            raise BundleError(f"an engine has {name} of type {dtype}, which is none: compile the bundle again")
        return cls(data["name"], tuple(data["shape"]), data["dtype"])


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an engine. Engines are bound by name, never by position."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec:
        """That of this name; ``BundleError`` if there is none."""
        return _by_name(self.inputs, name)

    def output(self, name: str) -> TensorSpec:
        """That of this name; ``BundleError`` if there is none."""
        return _by_name(self.outputs, name)

    def at(self, sizes: Mapping[str, int]) -> "Signature":
        """With these symbolic dimensions as fixed sizes."""
        inputs, outputs = (tuple(spec.at(sizes) for spec in side) for side in (self.inputs, self.outputs))
        return Signature(inputs, outputs)

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [s.to_json() for s in self.inputs], "outputs": [s.to_json() for s in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signature":
        inputs, outputs = ([TensorSpec.from_json(s) for s in data[side]] for side in ("inputs", "outputs"))
        return cls(tuple(inputs), tuple(outputs))


def _by_name(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    there = in_one_line(", ".join(spec.name for spec in specs))
    raise BundleError(f"an engine lacks the tensor {shortened(name)}, and has {there}: compile the bundle again")
