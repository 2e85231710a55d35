"""Where buffers lie. A buffer has a ``shape`` and a ``dtype``, and is sliced along its first axis without a copy."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.runtime.engine import Call

Buffer = Any  # a numpy array on the host; on other devices what their library has for it
CPU, CUDA = "cpu", "cuda"
ALIGNMENT = 256  # bytes; buffers begin at a multiple of it, as TensorRT wants of all that it reads and writes


@dataclass(frozen=True)
class DeviceName:
    """What a user calls a device: ``cpu``, ``cuda``, ``cuda:1``."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return CPU if self.kind == CPU else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> "DeviceName":
        """Read a name.

        Raises:
            InputError: it is none.
        """
        match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text, re.ASCII)
        if match is None:
            raise InputError(f"device is {text!r}; use cpu, cuda, or one of several GPUs by its number, as cuda:1")
        return cls(CPU) if text == CPU else cls(CUDA, int(match[1] or 0))


class Device(ABC):
    """Memory that engines read and write. All copies are asked for by name, so that none happens unseen.

    On devices that work beside the host, calls, uploads and copies are carried out in the order in which they were made.
    """

    name: str
    beside_host = False  # does its work go on while the host does something else?

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A new buffer, C-contiguous. Filled with zeros: what was never written must not be NaN.

        Raises:
            InputError: the device has not so much memory left; says how much was wanted, and how much there is if known.
        """

    @abstractmethod
    def part(self, memory: Buffer, start: int, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer in ``memory`` [bytes] uint8, a buffer of this device, from byte ``start`` on. Nothing is copied.

        ``memory`` lives at least as long as what lies in it.
        """

    def for_session(self) -> "Device":
        """What one session works with: this device, unless sessions get streams of their own."""
        return self

    @abstractmethod
    def owns(self, value: Any) -> bool:
        """Is ``value`` a buffer of this device?"""

    def adopt(self, value: Any) -> Any:
        """``value`` itself, or what lies on the device in an array of another library, as a buffer that ``upload`` takes.

        Work of this device then comes after what that library still does to the array.

        Raises:
            InputError: the array is on another GPU, or not contiguous.
        """
        return value

    @abstractmethod
    def upload(self, value: Array, buffer: Buffer) -> None:
        """Copy a host array, or a buffer of this device, of the same shape and dtype into ``buffer``."""

    @abstractmethod
    def download(self, buffer: Buffer) -> Array:
        """A copy of ``buffer`` on the host, when all that was started before is done. bfloat16 comes as float32."""

    @abstractmethod
    def copy(self, buffer: Buffer) -> Buffer:
        """A copy on this device."""

    def gather(self, buffer: Buffer, rows: Sequence[int]) -> Buffer:
        """A new buffer of these ``rows`` of ``buffer``, along its first axis (the samples of a batch), in this order.

        Raises:
            InputError: there is no such row.
        """
        _check_rows(rows, buffer)
        result = self.empty((len(rows), *buffer.shape[1:]), str(buffer.dtype).removeprefix("torch."))
        for place, row in enumerate(rows):
            self.upload(buffer[row : row + 1], result[place : place + 1])
        return result

    def scatter(self, values: Buffer, rows: Sequence[int], buffer: Buffer) -> None:
        """Copy ``values`` [n, …] to these n ``rows`` of ``buffer``, along its first axis; the other rows stay.

        Raises:
            InputError: there is no such row, one is named twice, or there are more or fewer than ``values``.
        """
        _check_rows(rows, buffer)
        if len(set(rows)) != len(rows) or len(rows) != values.shape[0]:
            raise InputError(f"{values.shape[0]} rows cannot be scattered to rows {list(rows)}: name a row of its own for each")
        for place, row in enumerate(rows):
            self.upload(values[place : place + 1], buffer[row : row + 1])

    def is_finite(self, buffer: Buffer) -> bool:
        """Does it hold numbers only, no NaN and no infinity? Waits for all that was started."""
        return bool(np.isfinite(self.download(buffer)).all())

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was started is done."""

    @abstractmethod
    def record(self, work: Callable[[], None]) -> "Call | None":
        """All that ``work`` starts, as one call that reads and writes the same buffers; ``None``: nothing would be gained.

        ``work`` must have run before, so that nothing is left that happens only the first time. It is not carried out.

        Raises:
            EngineError: it cannot be recorded; says why. The device is then as it was.
        """


def _check_rows(rows: Sequence[int], buffer: Buffer) -> None:
    if strange := [row for row in rows if not 0 <= row < buffer.shape[0]]:
        raise InputError(f"there is no row {strange[0]}: the buffer has {buffer.shape[0]} rows, counted from 0")


class Host(Device):
    """numpy arrays."""

    name = CPU

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        size = prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = np.zeros(size + ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:  # more than there is, or than numpy can count
            raise no_room(self.name, shape, np.dtype(dtype).itemsize) from error
        return self.part(memory, -memory.ctypes.data % ALIGNMENT, shape, dtype)

    def part(self, memory: Array, start: int, shape: tuple[int, ...], dtype: str) -> Array:
        size = prod(shape) * np.dtype(dtype).itemsize
        return memory[start : start + size].view(dtype).reshape(shape)

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def upload(self, value: Array, buffer: Array) -> None:
        np.copyto(buffer, value)

    def download(self, buffer: Array) -> Array:
        return buffer.copy()

    def copy(self, buffer: Array) -> Array:
        return buffer.copy()

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def record(self, work: Callable[[], None]) -> None:
        """The calls are all that there is."""


def no_room(device: str, shape: tuple[int, ...], itemsize: int, free: int | None = None) -> InputError:
    """An error for a buffer that finds no room; ``itemsize`` and ``free`` in bytes."""
    size = prod(shape) * itemsize
    known = "" if free is None else f" ({free / 1e6:.1f} MB are free)"
    return InputError(f"{device} has no room for {size / 1e6:.1f} MB more{known}: take a smaller batch or size")
