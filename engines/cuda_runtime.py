"""NVIDIA's CUDA runtime through cuda-bindings: imported when first used, errors with CUDA's own text, facts about the GPUs.

cuda-bindings can be imported where there is no driver; its functions then return an error.
"""

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cachec.runtime.errors import EngineError, InputError, missing_extra

OUT_OF_MEMORY, INSUFFICIENT_DRIVER = "cudaErrorMemoryAllocation", "cudaErrorInsufficientDriver"


@functools.cache
def runtime() -> Any:
    """The module ``cuda.bindings.runtime``: its functions return an error code and then their results.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise missing_extra("cuda-bindings", "gpu", "a GPU without torch") from error


def call(cuda: Any, name: str, *arguments: Any) -> Any:
    """Call a function of ``cuda``: ``None``, its result, or a tuple of its results.

    Raises:
        EngineError: CUDA refuses; with CUDA's name of the error and its text.
    """
    code, *results = getattr(cuda, name)(*arguments)
    if int(code):
        raise EngineError(f"CUDA: {name} fails with {error_text(cuda, code)}")
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def error_text(cuda: Any, code: Any) -> str:
    """CUDA's name of an error code, and what it says about it."""
    _, name = cuda.cudaGetErrorName(code)
    _, text = cuda.cudaGetErrorString(code)
    return f"{name.decode()} ({int(code)}): {text.decode()}"


@contextmanager
def on_gpu(cuda: Any, index: int) -> Iterator[None]:
    """Make a GPU the current one of this thread for a while: each thread begins with the first."""
    before = call(cuda, "cudaGetDevice")
    if before == index:
        yield
        return
    call(cuda, "cudaSetDevice", index)
    try:
        yield
    finally:
        call(cuda, "cudaSetDevice", before)


class _Thread(threading.local):
    """What this thread gave back while it captured, which CUDA forbids until then."""

    waiting: "list[tuple[Any, ...]] | None" = None


_thread = _Thread()


def release(cuda: Any, index: int, name: str, handle: Any, *kept: object) -> None:
    """Give something of a GPU back, with the function ``name``; when a capture in this thread is over, if there is one.

    ``kept`` lives until then.
    """
    if _thread.waiting is not None:
        _thread.waiting.append((cuda, index, name, handle, *kept))
        return
    with on_gpu(cuda, index):
        call(cuda, name, handle)


@contextmanager
def keeping() -> Iterator[None]:
    """Let what is given back meanwhile wait: the garbage collector may come at any time."""
    outer, _thread.waiting = _thread.waiting, []
    try:
        yield
    finally:
        waiting, _thread.waiting = _thread.waiting, outer
        for given in waiting:
            release(*given)


def check_gpu(index: int) -> None:
    """Raise ``InputError`` unless there is such a GPU; says what was looked for."""
    cuda = runtime()
    code, count = cuda.cudaGetDeviceCount()
    if code.name == INSUFFICIENT_DRIVER:
        here, needed = (".".join(map(str, version)) for version in (driver_version(), runtime_version()))
        found = "there is no NVIDIA driver" if driver_version() == (0, 0) else f"NVIDIA's driver is for CUDA {here} only"
        raise InputError(
            f"device is cuda:{index}, but {found}, and cuda-bindings is for CUDA {needed}: {error_text(cuda, code)}. "
            "Install a driver for it"
        )
    if int(code):
        raise InputError(f"device is cuda:{index}, but there is no GPU here: {error_text(cuda, code)}")
    if index >= count:
        raise InputError(f"device is cuda:{index}, but there are {count} GPUs, counted from 0")


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver is for, (13, 0) say; (0, 0) without a driver."""
    return _version(call(runtime(), "cudaDriverGetVersion"))


def runtime_version() -> tuple[int, int]:
    """The CUDA that cuda-bindings is for."""
    return _version(call(runtime(), "cudaRuntimeGetVersion"))


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def gpu_name(index: int) -> str:
    """What NVIDIA calls it, ``NVIDIA H200`` say."""
    return str(call(runtime(), "cudaGetDeviceProperties", index).name.decode())


def compute_capability(index: int) -> tuple[int, int]:
    """Which instructions it has, (9, 0) say."""
    properties = call(runtime(), "cudaGetDeviceProperties", index)
    return int(properties.major), int(properties.minor)


def memory_bytes(index: int) -> tuple[int, int]:
    """Its memory in bytes: what is free, and all of it."""
    cuda = runtime()
    with on_gpu(cuda, index):
        free, total = call(cuda, "cudaMemGetInfo")
    return int(free), int(total)
