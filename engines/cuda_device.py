"""GPU memory without torch: NVIDIA's driver library, as far as buffers need it.

The driver gives what ONNX Runtime's own values do not: one stream for the copies and for all engines, so that nothing has to
wait for the host, and what memory is left. It comes with every GPU driver. The context is the primary one of the GPU, which all
CUDA libraries of the process share.
"""

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

import numpy as np

from cachec.runtime.device import CUDA, Device, DeviceName, no_room
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.specs import BFLOAT16, Array, itemsize

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the stream that others use by default

# the functions used here, with their argument types as in cuda.h; all return an error code
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


class Driver:
    """One GPU through the driver library: its context and one stream. All pointers are integers."""

    def __init__(self, index: int, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise InputError(
                f"device is cuda:{index}, but NVIDIA's driver library {library} cannot be loaded: {error}. "
                "Install a driver, or use --device cpu"
            ) from error
        for name, types in FUNCTIONS.items():
            getattr(self._library, name).argtypes = types
        try:
            self._call("cuInit", 0)
        except EngineError as error:
            raise InputError(f"device is cuda:{index}, but there is no GPU here: {error}. Use --device cpu") from error
        count, device, context, stream = c_int(), c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if index >= count.value:
            raise InputError(f"device is cuda:{index}, but there are {count.value} GPUs, counted from 0")
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def allocate(self, size: int) -> int | None:
        """Zeroed memory of ``size`` bytes; ``None`` if there is not so much."""
        pointer = c_uint64()
        code = self._run("cuMemAlloc_v2", ctypes.byref(pointer), size)
        if code == OUT_OF_MEMORY:
            return None
        self._check("cuMemAlloc_v2", code)
        self._check("cuMemsetD8Async", self._run("cuMemsetD8Async", pointer, 0, size, self.stream))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back; waits until nothing uses it."""
        self._check("cuMemFree_v2", self._run("cuMemFree_v2", pointer))

    def free_bytes(self) -> int:
        """Bytes that are left on the GPU."""
        free, total = c_size_t(), c_size_t()
        self._check("cuMemGetInfo_v2", self._run("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)))
        return free.value

    def copy(self, kind: str, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes; ``kind`` is ``HtoD``, ``DtoH`` or ``DtoD``."""
        name = f"cuMemcpy{kind}Async_v2"
        self._check(name, self._run(name, target, source, size, self.stream))

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._check("cuStreamSynchronize", self._run("cuStreamSynchronize", self.stream))

    def _run(self, name: str, *arguments: Any) -> int:
        """Call a function in the context, whichever thread this is; returns its error code."""
        self._call("cuCtxSetCurrent", self._context)
        return int(getattr(self._library, name)(*arguments))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, int(getattr(self._library, name)(*arguments)))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise EngineError(f"CUDA driver: {name} fails with error {code}: {(text.value or b'unknown').decode()}")


class CudaBuffer:
    """Part of an allocation, C-contiguous, sliced along its first axis. ``pointer`` is its address on the GPU."""

    def __init__(self, owner: "_Memory", pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self._owner = owner  # freed with the last buffer in it
        self.pointer, self.shape, self.dtype = pointer, shape, dtype
        self.nbytes = itemsize(dtype)
        for extent in shape:
            self.nbytes *= extent

    @property
    def device(self) -> "CudaDevice":
        return self._owner.device

    def is_contiguous(self) -> bool:
        return True

    def __getitem__(self, index: int | slice) -> "CudaBuffer":
        length, rest = self.shape[0], self.shape[1:]
        stride = self.nbytes // length if length else 0
        if isinstance(index, slice):
            start, stop, step = index.indices(length)
            if step != 1:
                raise IndexError(f"a GPU buffer is sliced without a step, not by {index}")
            shape = (max(0, stop - start), *rest)
            return CudaBuffer(self._owner, self.pointer + start * stride, shape, self.dtype)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length} rows")
        return CudaBuffer(self._owner, self.pointer + (index % length) * stride, rest, self.dtype)


class _Memory:
    """One allocation."""

    def __init__(self, device: "CudaDevice", pointer: int, free: Callable[[int], None]) -> None:
        self.device = device
        weakref.finalize(self, free, pointer).atexit = False  # the process frees all, when the driver may be gone


class CudaDevice(Device):
    """Memory of one GPU, and the one stream that everything on it is queued in."""

    calculates = False

    def __init__(self, index: int, library: str = LIBRARY) -> None:
        self.name = f"{CUDA}:{index}"
        self._driver = Driver(index, library)

    @property
    def stream(self) -> int:
        """Address of the stream, for libraries that are to queue their work in it."""
        return self._driver.stream

    def empty(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        size = itemsize(dtype)
        for extent in shape:
            size *= extent
        pointer = self._driver.allocate(max(size, 1))
        if pointer is None:
            raise no_room(self.name, shape, itemsize(dtype), self._driver.free_bytes())
        return CudaBuffer(_Memory(self, pointer, self._driver.free), pointer, shape, dtype)

    def part(self, memory: CudaBuffer, start: int, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        return CudaBuffer(memory._owner, memory.pointer + start, shape, dtype)

    def owns(self, value: Any) -> bool:
        return isinstance(value, CudaBuffer) and value.device is self

    def upload(self, value: Any, buffer: CudaBuffer) -> None:
        if isinstance(value, CudaBuffer):
            self._driver.copy("DtoD", buffer.pointer, value.pointer, buffer.nbytes)
            return
        host = np.ascontiguousarray(value, buffer.dtype)
        self._driver.copy("HtoD", buffer.pointer, host.ctypes.data, buffer.nbytes)
        self._driver.synchronize()  # else pinned memory would be read after this returns

    def download(self, buffer: CudaBuffer) -> Array:
        wide = buffer.dtype == BFLOAT16
        host = np.empty(buffer.shape, np.uint16 if wide else buffer.dtype)
        self._driver.copy("DtoH", host.ctypes.data, buffer.pointer, buffer.nbytes)
        self._driver.synchronize()
        return (host.astype(np.uint32) << 16).view(np.float32) if wide else host

    def copy(self, buffer: CudaBuffer) -> CudaBuffer:
        copied = self.empty(buffer.shape, buffer.dtype)
        self.upload(buffer, copied)
        return copied

    def synchronize(self) -> None:
        self._driver.synchronize()

    def record(self, work: Callable[[], None]) -> None:
        """Nothing: ONNX Runtime records each of its calls itself, and cannot be recorded from outside."""


@functools.cache
def cuda_device(name: DeviceName) -> CudaDevice:
    """The GPU, with the one stream that all engines of the process share.

    Raises:
        InputError: there is no such GPU, or no driver.
    """
    return CudaDevice(name.index)
