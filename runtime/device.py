"""Where buffers lie. A buffer has a ``shape`` and a ``dtype``, and is sliced along its first axis without a copy."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from cachec.runtime.errors import EngineError
from cachec.runtime.specs import Array

Buffer = Any  # a numpy array on the host; on other devices what their library has for it


class Device(ABC):
    """Memory that engines read and write. All copies are asked for by name, so that none happens unseen."""

    name: str

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A new buffer, C-contiguous. Filled with zeros: what was never written must not be NaN.

        Raises:
            EngineError: the device has not so much memory left; says how much was wanted.
        """

    @abstractmethod
    def upload(self, value: Array, buffer: Buffer) -> None:
        """Copy a host array, or a buffer of this device, of the same shape and dtype into ``buffer``."""

    @abstractmethod
    def download(self, buffer: Buffer) -> Array:
        """A copy of ``buffer`` on the host, when all that was started before is done."""

    @abstractmethod
    def copy(self, buffer: Buffer) -> Buffer:
        """A copy on this device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was started is done."""


class Host(Device):
    """numpy arrays."""

    name = "cpu"

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        try:
            return np.zeros(shape, dtype)
        except MemoryError as error:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raise EngineError(f"there is no memory for a buffer of {size / 1e6:.1f} MB more: take a smaller batch") from error

    def upload(self, value: Array, buffer: Array) -> None:
        np.copyto(buffer, value)

    def download(self, buffer: Array) -> Array:
        return buffer.copy()

    def copy(self, buffer: Array) -> Array:
        return buffer.copy()

    def synchronize(self) -> None:
        """Nothing is ever pending."""
