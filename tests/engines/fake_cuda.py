"""Stands for ``cuda.bindings.runtime`` on host memory, so that what passes through it can be tested without a GPU.

Work is only queued, and done when something waits for it, so that whoever forgets to wait, or to put one stream behind
another, reads what is not there yet. Memory comes filled with 255. A capture collects the work that would have been queued;
launching its graph queues it. ``fail`` lets a call return an error, ``gone`` all of them. Other libraries' fakes queue their
work by ``enqueue``.

    fake = FakeCuda()
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
"""

import ctypes
import threading
from dataclasses import dataclass, field
from enum import EnumMeta, IntEnum
from types import SimpleNamespace

cudaStreamNonBlocking = 1
cudaEventDisableTiming = 2
ALIGNMENT = 256


class Unsubscriptable(EnumMeta):
    """As the enumerations of cuda-bindings are."""

    def __getitem__(cls, name):
        raise TypeError(f"type '{cls.__name__}' is not subscriptable")


class cudaError_t(IntEnum, metaclass=Unsubscriptable):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum, metaclass=Unsubscriptable):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum, metaclass=Unsubscriptable):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


Error = cudaError_t
OK = Error.cudaSuccess


@dataclass
class Handle:
    """Of a stream, event or graph; the real ones are numbers, too."""

    number: int

    def __int__(self):
        return self.number


@dataclass
class Stream:
    gpu: int
    queue: list = field(default_factory=list)
    done: int = 0  # of all that was ever queued
    capture: list | None = None
    broken: bool = False  # the capture
    thread: int = 0  # that captures

    @property
    def end(self):
        return self.done + len(self.queue)


@dataclass
class Block:
    memory: ctypes.Array
    size: int
    gpu: int


class FakeCuda:
    """``log`` has (function, arguments) of all calls, and of work by ``enqueue``, in order."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDisableTiming = cudaStreamNonBlocking, cudaEventDisableTiming

    def __init__(self, gpus=1, memory=1 << 24, driver=13000, capability=(9, 0)):
        self.gpus, self.memory, self.driver, self.capability = gpus, memory, driver, capability
        self.log = []
        self.streams = {1: Stream(0), 2: Stream(0)}  # the default ones, of all and of a thread
        self.events, self.graphs, self.launchable, self.blocks = {}, {}, {}, {}
        self._failures, self._thread, self._next = {}, threading.local(), 1000
        self.gone = False  # as a GPU is that fell off its bus

    # what tests and other fakes use

    def fail(self, function, error, after=0):
        """Let the call of ``function`` that comes after ``after`` more of them return ``error``, a name."""
        self._failures[function] = [after, getattr(Error, error)]

    def enqueue(self, stream, function, name="kernel"):
        """Queue ``function()`` in a stream, by its address, or add it to the capture there; is there such a stream?"""
        self.log.append((name, int(stream)))
        return self._queue(stream, function) is OK

    def is_capturing(self, stream):
        return self.streams[int(stream)].capture is not None

    def names(self):
        return [name for name, *_ in self.log]

    def flush(self, stream, until=None):
        """Do what is queued in a stream."""
        stream = self.streams.get(int(stream), Stream(0))  # one that was destroyed has done all
        while stream.queue and (until is None or stream.done < until):
            work = stream.queue.pop(0)
            stream.done += 1
            work()

    def _queue(self, stream, work):
        stream = self.streams.get(int(stream))
        if stream is None:
            return Error.cudaErrorInvalidResourceHandle
        (stream.queue if stream.capture is None else stream.capture).append(work)
        return OK

    def _begin(self, function, *arguments):
        """Note a call; the error that it is to return, or success."""
        self.log.append((function, *(int(a) if isinstance(a, Handle) else a for a in arguments)))
        if not self.driver and function not in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"):
            return Error.cudaErrorInsufficientDriver
        if self.gone:
            return Error.cudaErrorNoDevice
        failure = self._failures.get(function)
        if failure is not None:
            failure[0] -= 1
            if failure[0] < 0:
                return self._failures.pop(function)[1]
        return OK

    def _forbidden(self, stream=None):
        """Break the captures that a call breaks: one that waits or allocates in the thread, or that waits for the stream."""
        me = threading.get_ident()
        found = [
            s for n, s in self.streams.items() if s.capture is not None and (s.thread == me if stream is None else n == stream)
        ]
        for capturing in found:
            capturing.broken = True
        return bool(found)

    def _handle(self, where, value):
        self._next += 1
        where[self._next] = value
        return Handle(self._next)

    def _block(self, pointer, size):
        return next((b for p, b in self.blocks.items() if p <= pointer and pointer + size <= p + b.size), None)

    # what cuda.bindings.runtime has: the same names, parameters and results

    def cudaGetErrorName(self, error):
        return OK, Error(error).name.encode()

    def cudaGetErrorString(self, error):
        return OK, f"text of {Error(error).name.removeprefix('cudaError')}".encode()

    def cudaDriverGetVersion(self):
        return self._begin("cudaDriverGetVersion"), self.driver

    def cudaRuntimeGetVersion(self):
        return self._begin("cudaRuntimeGetVersion"), 13050

    def cudaGetDeviceCount(self):
        error = self._begin("cudaGetDeviceCount")
        error = error or (OK if self.gpus else Error.cudaErrorNoDevice)
        return error, None if error else self.gpus

    def cudaGetDevice(self):
        return OK, getattr(self._thread, "gpu", 0)

    def cudaSetDevice(self, device):
        error = self._begin("cudaSetDevice", device)
        if not error and not 0 <= device < self.gpus:
            return (Error.cudaErrorInvalidDevice,)
        self._thread.gpu = device
        return (error,)

    def cudaGetDeviceProperties(self, device):
        error = self._begin("cudaGetDeviceProperties", device)
        major, minor = self.capability
        return error, None if error else SimpleNamespace(name=b"Fake GPU", major=major, minor=minor)

    def cudaMemGetInfo(self):
        error = self._begin("cudaMemGetInfo")
        gpu = self.cudaGetDevice()[1]
        used = sum(block.size for block in self.blocks.values() if block.gpu == gpu)
        return (error, None, None) if error else (OK, self.memory - used, self.memory)

    def cudaMalloc(self, size):
        error = self._begin("cudaMalloc", size)
        gpu = self.cudaGetDevice()[1]
        if not error and self._forbidden():
            error = Error.cudaErrorStreamCaptureUnsupported
        if not error and size + sum(block.size for block in self.blocks.values() if block.gpu == gpu) > self.memory:
            error = Error.cudaErrorMemoryAllocation
        if error:
            return error, None
        memory = ctypes.create_string_buffer(size + ALIGNMENT)
        pointer = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(pointer, 255, size)
        self.blocks[pointer] = Block(memory, size, gpu)
        return OK, pointer

    def cudaFree(self, devPtr):
        error = self._begin("cudaFree", devPtr)
        if not error and self._forbidden():
            return (Error.cudaErrorStreamCaptureUnsupported,)
        if not error and devPtr not in self.blocks:
            error = Error.cudaErrorInvalidValue
        if error:
            return (error,)
        for stream in self.streams:  # it waits for all of the GPU
            self.flush(stream)
        del self.blocks[devPtr]
        return (error,)

    def cudaPointerGetAttributes(self, ptr):
        error, block = self._begin("cudaPointerGetAttributes", ptr), self._block(ptr, 0)
        return error, None if error else SimpleNamespace(device=-2 if block is None else block.gpu)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        error = self._begin("cudaMemsetAsync", devPtr, value, count, stream)
        if not error and self._block(devPtr, count) is None:
            return (Error.cudaErrorInvalidValue,)
        return (error or self._queue(stream, lambda: ctypes.memset(devPtr, value, count)),)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        error = self._begin("cudaMemcpyAsync", dst, src, count, kind, stream)
        from_gpu, to_gpu = kind in (2, 3), kind in (1, 3)
        if not error and any(on_gpu != (self._block(p, count) is not None) for p, on_gpu in ((src, from_gpu), (dst, to_gpu))):
            return (Error.cudaErrorInvalidValue,)
        return (error or self._queue(stream, lambda: ctypes.memmove(dst, src, count)),)

    def cudaStreamCreateWithFlags(self, flags):
        error = self._begin("cudaStreamCreateWithFlags", flags)
        return error, None if error else self._handle(self.streams, Stream(self.cudaGetDevice()[1]))

    def cudaStreamDestroy(self, stream):
        error = self._begin("cudaStreamDestroy", stream)
        self.flush(stream)
        del self.streams[int(stream)]
        return (error,)

    def cudaStreamSynchronize(self, stream):
        error = self._begin("cudaStreamSynchronize", stream)
        if not error and self._forbidden(int(stream)):
            return (Error.cudaErrorStreamCaptureUnsupported,)
        if not error:
            self.flush(stream)
        return (error,)

    def cudaEventCreateWithFlags(self, flags):
        error = self._begin("cudaEventCreateWithFlags", flags)
        return error, None if error else self._handle(self.events, None)

    def cudaEventRecord(self, event, stream):
        error = self._begin("cudaEventRecord", event, stream)
        self.events[int(event)] = (int(stream), self.streams[int(stream)].end)
        return (error,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        error, recorded = self._begin("cudaStreamWaitEvent", stream, event, flags), self.events[int(event)]
        return (error or self._queue(stream, lambda: self.flush(*recorded)),)

    def cudaEventDestroy(self, event):
        error = self._begin("cudaEventDestroy", event)
        del self.events[int(event)]
        return (error,)

    def cudaStreamBeginCapture(self, stream, mode):
        error, found = self._begin("cudaStreamBeginCapture", stream, mode), self.streams[int(stream)]
        if not error:
            found.capture, found.broken, found.thread = [], False, threading.get_ident()
        return (error,)

    def cudaStreamEndCapture(self, stream):
        error, found = self._begin("cudaStreamEndCapture", stream), self.streams[int(stream)]
        work, found.capture = found.capture, None
        error = error or (Error.cudaErrorStreamCaptureInvalidated if found.broken else OK)
        return error, None if error else self._handle(self.graphs, work)

    def cudaGraphInstantiate(self, graph, flags):
        error = self._begin("cudaGraphInstantiate", graph, flags)
        return error, None if error else self._handle(self.launchable, list(self.graphs[int(graph)]))

    def cudaGraphLaunch(self, graphExec, stream):
        error, work = self._begin("cudaGraphLaunch", graphExec, stream), self.launchable[int(graphExec)]
        return (error or self._queue(stream, lambda: [node() for node in work]),)

    def cudaGraphDestroy(self, graph):
        error = self._begin("cudaGraphDestroy", graph)
        del self.graphs[int(graph)]
        return (error,)

    def cudaGraphExecDestroy(self, graphExec):
        error = self._begin("cudaGraphExecDestroy", graphExec)
        del self.launchable[int(graphExec)]
        return (error,)
