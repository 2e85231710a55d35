"""PyTorch tensors as buffers, on the device that PyTorch runs on."""

from typing import Any

import numpy as np
import torch

from cachec.runtime.device import Buffer, Device, Host
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


class TorchDevice(Device):
    """Tensors of one PyTorch device, ``cuda:0`` say."""

    def __init__(self, device: str) -> None:
        self.name = device
        self._device = torch.device(device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        try:
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
        except torch.OutOfMemoryError as error:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise InputError(f"{self.name} has no room for {size / 1e6:.1f} MB more: take a smaller batch or size") from error

    def upload(self, value: Any, buffer: torch.Tensor) -> None:
        buffer.copy_(torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def download(self, buffer: torch.Tensor) -> Array:
        array: Array = buffer.to("cpu", copy=True).numpy()
        return array

    def copy(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.clone()

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def device_of(name: str) -> Device:
    """The device that buffers lie on: numpy arrays for the CPU.

    Raises:
        InputError: PyTorch has no such device here.
    """
    if name == "cpu":
        return Host()
    if not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but PyTorch {torch.__version__} sees no CUDA device here: use cpu")
    return TorchDevice(name)


def as_tensor(buffer: Buffer) -> torch.Tensor:
    """A tensor on the same memory."""
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
