"""GPU memory without torch: one stream for the copies and for all engines that work in it, so that nothing waits for the host.

The GPU's context is its primary one, which all CUDA libraries of the process share.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import numpy as np

from cachec.engines import cuda_runtime, dlpack
from cachec.engines.cuda_runtime import call, error_text, keeping, on_gpu, release
from cachec.runtime.device import CUDA, Device, DeviceName, no_room
from cachec.runtime.engine import Call
from cachec.runtime.errors import CachecError, EngineError, InputError
from cachec.runtime.specs import BFLOAT16, Array, itemsize

DEFAULT_STREAM = 1  # DLPack and CUDA call it so: the one that waits for other streams, where nobody says which
NO_STREAM = -1  # DLPack: nobody is to wait
KINDS = {"HtoD": "cudaMemcpyHostToDevice", "DtoH": "cudaMemcpyDeviceToHost", "DtoD": "cudaMemcpyDeviceToDevice"}


class CudaBuffer:
    """Part of an allocation, C-contiguous, sliced along its first axis. ``pointer`` is its address on the GPU.

    Other libraries take it without a copy, by DLPack: ``torch.from_dlpack(buffer)``. What they queue then comes after what was
    queued in the buffer's own stream before. CUDA's array interface waits for that instead.
    """

    def __init__(self, owner: "_Memory | _Loan", pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self._owner = owner  # freed with the last buffer in it
        self.pointer, self.shape, self.dtype = pointer, shape, dtype
        self.nbytes = prod(shape) * itemsize(dtype)

    @property
    def device(self) -> "CudaDevice":
        return self._owner.device

    @property
    def is_borrowed(self) -> bool:
        """Is the memory another library's?"""
        return isinstance(self._owner, _Loan)

    def is_contiguous(self) -> bool:
        return True

    def part(self, start: int, shape: tuple[int, ...], dtype: str) -> "CudaBuffer":
        """A buffer in this one, from byte ``start`` on."""
        return CudaBuffer(self._owner, self.pointer + start, shape, dtype)

    def __getitem__(self, index: int | slice) -> "CudaBuffer":
        length, rest = self.shape[0], self.shape[1:]
        stride = self.nbytes // length if length else 0
        if isinstance(index, slice):
            start, stop, step = index.indices(length)
            if step != 1:
                raise IndexError(f"a GPU buffer is sliced without a step, not by {index}")
            return self.part(start * stride, (max(0, stop - start), *rest), self.dtype)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length} rows")
        return self.part((index % length) * stride, rest, self.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        here = self.__dlpack_device__()
        if dl_device not in (None, here):
            raise BufferError(f"this buffer lies on device {here}, not on {dl_device}: copy it there first")
        lent = self.device.copy(self) if copy else self
        if stream != NO_STREAM:
            self.device.let_wait(stream or DEFAULT_STREAM)
        versioned = max_version is not None and max_version[0] >= dlpack.VERSION[0]
        return dlpack.lend(lent, lent.pointer, lent.shape, lent.dtype, here, versioned=versioned)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == BFLOAT16:
            raise AttributeError("CUDA's array interface has no bfloat16: take the buffer by DLPack")
        self.device.synchronize()  # torch does not heed "stream"
        data, kind = (self.pointer, False), np.dtype(self.dtype).str
        return {"shape": self.shape, "typestr": kind, "data": data, "strides": None, "stream": None, "version": 3}


class _Memory:
    """One allocation."""

    def __init__(self, device: "CudaDevice", cuda: Any, pointer: int) -> None:
        self.device = device
        # cudaFree waits until nothing uses the memory, in any stream. The process frees all, when the driver may be gone
        weakref.finalize(self, release, cuda, device.index, "cudaFree", pointer).atexit = False


class _Loan:
    """Memory of another library, kept as long as this lives."""

    def __init__(self, device: "CudaDevice", lender: Any) -> None:
        self.device, self._lender = device, lender


class CudaDevice(Device):
    """Memory of one GPU, and the one stream that everything on it is queued in.

    ``captures``: its calls can be recorded as a CUDA graph; each session then gets a device with a stream of its own, so that
    nothing of another session is caught. Buffers of one such device are no buffers of another (``owns``), since nothing keeps
    their streams in step: what is uploaded from there is borrowed, and waits for both.
    """

    beside_host = True

    def __init__(self, index: int, *, captures: bool = False) -> None:
        cuda_runtime.check_gpu(index)
        self._cuda = cuda_runtime.runtime()
        self.name, self.index = f"{CUDA}:{index}", index
        self._captures, self._capturing = captures, False
        with on_gpu(self._cuda, index):
            stream = call(self._cuda, "cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(stream)  # its address, for libraries that are to queue their work in it
        weakref.finalize(self, release, self._cuda, index, "cudaStreamDestroy", self.stream).atexit = False

    def for_session(self) -> "CudaDevice":
        return CudaDevice(self.index, captures=True) if self._captures else self

    @property
    def capturing(self) -> bool:
        """Are calls being recorded? They must then only queue their work, and neither wait nor allocate."""
        return self._capturing

    def current(self) -> AbstractContextManager[None]:
        """Makes this GPU the current one of the thread, for libraries that work on that one."""
        return on_gpu(self._cuda, self.index)

    def keep(self, thing: object, *, owner: object) -> None:
        """Let ``thing`` go with ``owner``, but when all that is queued is done, and not while calls are captured."""
        weakref.finalize(
            owner, release, self._cuda, self.index, "cudaStreamSynchronize", self.stream, self, thing
        ).atexit = False

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime on this GPU, whichever is the current one of this thread."""
        with on_gpu(self._cuda, self.index):
            return call(self._cuda, name, *arguments)

    def empty(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        size = max(prod(shape) * itemsize(dtype), 1)
        with on_gpu(self._cuda, self.index):
            code, pointer = self._cuda.cudaMalloc(size)
        if code.name == cuda_runtime.OUT_OF_MEMORY:
            free, _ = self.call("cudaMemGetInfo")
            raise no_room(self.name, shape, itemsize(dtype), free)
        if int(code):
            raise EngineError(f"CUDA: cudaMalloc fails with {error_text(self._cuda, code)}")
        memory = _Memory(self, self._cuda, int(pointer))
        self.call("cudaMemsetAsync", int(pointer), 0, size, self.stream)
        return CudaBuffer(memory, int(pointer), shape, dtype)

    def part(self, memory: CudaBuffer, start: int, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        return memory.part(start, shape, dtype)

    def owns(self, value: Any) -> bool:
        return isinstance(value, CudaBuffer) and value.device is self

    def adopt(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) or self.owns(value):
            return value
        if hasattr(value, "__dlpack_device__"):
            kind, index = value.__dlpack_device__()
            if kind in (dlpack.CUDA, dlpack.CUDA_MANAGED):
                self._check_place(value, index)
                with self.current():  # torch lends only what lies on its current GPU
                    loan = dlpack.borrow(value, self.stream)
                return self._borrowed(value, loan.pointer, loan.shape, loan.dtype, loan.is_contiguous, loan)
        elif hasattr(value, "__cuda_array_interface__"):
            return self._from_array_interface(value)
        return value

    def _from_array_interface(self, value: Any) -> CudaBuffer:
        facts = value.__cuda_array_interface__
        pointer, kind, shape = facts["data"][0], np.dtype(facts["typestr"]), tuple(facts["shape"])
        if pointer:
            self._check_place(value, self.call("cudaPointerGetAttributes", pointer).device)
        if facts.get("stream") is not None:
            self._wait_for(facts["stream"])
        strides = facts.get("strides")
        contiguous = strides is None or dlpack.is_contiguous(shape, tuple(stride / kind.itemsize for stride in strides))
        return self._borrowed(value, pointer, shape, kind.name, contiguous, value)

    def _check_place(self, value: Any, index: int) -> None:
        if index != self.index:
            raise InputError(
                f"a {type(value).__name__} lies on cuda:{index}, and this session is on {self.name}: move it there"
            )

    def _borrowed(
        self, value: Any, pointer: int, shape: tuple[int, ...], dtype: str, contiguous: bool, lender: Any
    ) -> CudaBuffer:
        if not contiguous:
            raise InputError(f"a {type(value).__name__} of shape {list(shape)} is not contiguous: make it so first")
        return CudaBuffer(_Loan(self, lender), pointer, shape, dtype)

    def let_wait(self, stream: int) -> None:
        """What is queued in another stream from now on comes after what was queued in this device's until now."""
        self._follow(stream, self.stream)

    def _wait_for(self, stream: int) -> None:
        """The other way round."""
        self._follow(self.stream, stream)

    def _follow(self, later: int, earlier: int) -> None:
        if later == earlier:
            return
        event = self.call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        try:
            self.call("cudaEventRecord", event, earlier)
            self.call("cudaStreamWaitEvent", later, event, 0)
        finally:
            self.call("cudaEventDestroy", event)  # it is gone when it is done

    def upload(self, value: Any, buffer: CudaBuffer) -> None:
        """As ``Device.upload``. Waits for the copy, unless ``value`` is a buffer of this device: others may change it then."""
        if isinstance(value, CudaBuffer):
            self._copy("DtoD", buffer.pointer, value.pointer, buffer.nbytes)
            wait = value.is_borrowed
        else:
            host = np.ascontiguousarray(value, buffer.dtype)
            self._copy("HtoD", buffer.pointer, host.ctypes.data, buffer.nbytes)
            wait = True
        if wait:
            self.synchronize()

    def download(self, buffer: CudaBuffer) -> Array:
        wide = buffer.dtype == BFLOAT16
        host = np.empty(buffer.shape, np.uint16 if wide else buffer.dtype)
        self._copy("DtoH", host.ctypes.data, buffer.pointer, buffer.nbytes)
        self.synchronize()
        return (host.astype(np.uint32) << 16).view(np.float32) if wide else host

    def copy(self, buffer: CudaBuffer) -> CudaBuffer:
        copied = self.empty(buffer.shape, buffer.dtype)
        self.upload(buffer, copied)
        return copied

    def _copy(self, kind: str, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes."""
        self.call("cudaMemcpyAsync", target, source, size, getattr(self._cuda.cudaMemcpyKind, KINDS[kind]), self.stream)

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> Call | None:
        """A CUDA graph of ``work``, if the device captures. ONNX Runtime's calls cannot be captured from outside.

        Raises:
            EngineError: it cannot be captured; the stream is then as it was.
        """
        if not self._captures:
            return None
        try:
            with on_gpu(self._cuda, self.index), keeping():
                return _Replay(self, self._instantiate(self._capture(work)))
        except CachecError as error:
            reason = "; ".join([str(error), *getattr(error, "__notes__", ())])
            raise EngineError(f"they cannot be captured as a CUDA graph: {reason}") from error

    def _capture(self, work: Callable[[], None]) -> Any:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may allocate meanwhile
        call(self._cuda, "cudaStreamBeginCapture", self.stream, mode)
        self._capturing = True
        try:
            work()
        except BaseException as error:
            code, graph = self._cuda.cudaStreamEndCapture(self.stream)
            if int(code):
                error.add_note(f"cudaStreamEndCapture: {error_text(self._cuda, code)}")
            else:
                call(self._cuda, "cudaGraphDestroy", graph)
            raise
        finally:
            self._capturing = False
        return call(self._cuda, "cudaStreamEndCapture", self.stream)

    def _instantiate(self, graph: Any) -> Any:
        try:
            return call(self._cuda, "cudaGraphInstantiate", graph, 0)
        finally:
            call(self._cuda, "cudaGraphDestroy", graph)


class _Replay(Call):
    """A captured CUDA graph, launched in the device's stream."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph
        weakref.finalize(self, release, device._cuda, device.index, "cudaGraphExecDestroy", graph).atexit = False

    def run(self) -> None:
        self._device.call("cudaGraphLaunch", self._graph, self._device.stream)


@functools.cache
def cuda_device(name: DeviceName) -> CudaDevice:
    """The GPU, with the one stream that all engines of the process share which are given it when they are loaded (``ort``).

    Raises:
        InputError: there is no such GPU, or no driver.
        MissingExtraError: cuda-bindings is not installed.
    """
    return CudaDevice(name.index)
