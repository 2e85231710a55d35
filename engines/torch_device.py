"""PyTorch tensors as buffers, on the device that PyTorch runs on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from cachec.runtime.device import CPU, CUDA, Buffer, Device, DeviceName, Host, no_room
from cachec.runtime.engine import Call, LoadOptions
from cachec.runtime.errors import CachecError, EngineError, InputError, in_one_line
from cachec.runtime.specs import BFLOAT16, Array, Signature, itemsize


class TorchDevice(Device):
    """Tensors of one PyTorch device, ``cuda:0`` say; on the CPU they serve for bfloat16, which numpy has not."""

    def __init__(self, name: DeviceName) -> None:
        check_device(name)
        self.name = str(name)
        self._device = torch.device(self.name)
        self.beside_host = self._device.type == CUDA

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        try:
            with neutral_modes(self.name):
                return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == CUDA else None
            raise no_room(self.name, shape, itemsize(dtype), free) from error

    def part(self, memory: torch.Tensor, start: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        kind = getattr(torch, dtype)
        with neutral_modes(self.name):
            piece = memory[start : start + prod(shape) * kind.itemsize].view(kind).reshape(shape)
            fresh: torch.Tensor = from_dlpack(piece)  # not a view: torch.compile would look at where it begins
        return fresh

    def owns(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device == self._device

    def adopt(self, value: Any) -> Any:
        """As ``Device.adopt``; arrays of other libraries are copied, since these may change them at once."""
        if self._device.type != CUDA or isinstance(value, np.ndarray | torch.Tensor):
            return value
        if hasattr(value, "__dlpack_device__"):
            copied = from_dlpack(value).clone()
        elif hasattr(value, "__cuda_array_interface__"):
            copied = torch.as_tensor(value).clone()
        else:
            return value
        torch.cuda.current_stream(copied.device).synchronize()
        return copied

    def upload(self, value: Any, buffer: torch.Tensor) -> None:
        buffer.copy_(torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def download(self, buffer: torch.Tensor) -> Array:
        value = buffer.float() if buffer.dtype == torch.bfloat16 else buffer
        array: Array = value.to(CPU, copy=True).numpy()
        return array

    def copy(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.clone()

    def synchronize(self) -> None:
        if self._device.type != CUDA:
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            raise EngineError(f"work on the GPU failed: {in_one_line(error)}") from error

    def record(self, work: Callable[[], None]) -> Call | None:
        """A CUDA graph of ``work``; its temporary tensors get memory of their own.

        A capture that fails may keep some memory: PyTorch does not always let go of it.
        """
        if self._device.type != CUDA:
            return None
        with torch.cuda.device(self._device):
            before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            new_stream: Any = torch.cuda.Stream  # it has no types
            try:
                with torch.cuda.graph(graph, stream=new_stream(), capture_error_mode="thread_local"):
                    work()
            except (RuntimeError, CachecError) as error:
                torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own current when a capture fails
                reason = error.__context__ or error  # ending a capture that failed fails as well
                raise EngineError(f"they cannot be captured as a CUDA graph: {reason}") from error
        return _Replay(graph)


class _Replay(Call):
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def run(self) -> None:
        self._graph.replay()


def check_device(name: DeviceName) -> None:
    """Raise ``InputError`` unless PyTorch has this device here."""
    if name.kind == CPU:
        return
    if not torch.cuda.is_available():
        raise InputError(
            f"device is {name}, but torch.cuda.is_available() is False: PyTorch {torch.__version__} sees no GPU here. "
            "Install a CUDA build of torch and a driver, or use --device cpu"
        )
    if name.index >= torch.cuda.device_count():
        raise InputError(f"device is {name}, but there are {torch.cuda.device_count()} GPUs, counted from 0")


def free_bytes(name: DeviceName) -> int:
    """Bytes of a GPU that PyTorch can give: what nobody has, and what it holds itself and does not use."""
    there = torch.device(str(name))
    held = torch.cuda.memory_reserved(there) - torch.cuda.memory_allocated(there)
    return int(torch.cuda.mem_get_info(there)[0]) + held


def take_options(options: LoadOptions, signatures: Iterable[Signature]) -> Device:
    """Set PyTorch's threads, and give the device that the buffers lie on. Raises as ``device_of``."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return device_of(options.device, signatures)


def device_of(name: DeviceName, signatures: Iterable[Signature]) -> Device:
    """The device that the buffers of a bundle's engines lie on: numpy arrays for the CPU, if numpy has their dtypes.

    Raises:
        InputError: PyTorch has no such device here.
    """
    specs = [spec for signature in signatures for spec in (*signature.inputs, *signature.outputs)]
    if name.kind == CPU and all(spec.dtype != BFLOAT16 for spec in specs):
        return Host()
    return TorchDevice(name)


def as_tensor(buffer: Buffer) -> torch.Tensor:
    """A tensor on the same memory."""
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer


@contextmanager
def neutral_modes(device: str) -> Iterator[None]:
    """PyTorch's modes as they are when a process starts, whatever a caller has set: what is made inside works anywhere.

    Those are inference mode, gradients, autocast on ``device``, the default type and the default device.
    """
    before, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != CPU
    with (
        torch.inference_mode(False),  # which also turns gradients on
        torch.autocast(torch.device(device).type, enabled=False),
        torch.device(CPU) if elsewhere else nullcontext(),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def watching_memory(what: str, advice: str = "Take a smaller batch or size") -> Iterator[None]:
    """Turn PyTorch's errors about memory, which say how much was wanted, into an ``EngineError`` about ``what``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(f"there is no memory for {what}: {in_one_line(error)}. {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """On the CPU, PyTorch has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
