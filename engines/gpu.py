"""What GPU there is. Asked through NVIDIA's own Python bindings, which load on machines without one."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError, missing_extra


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``capability`` 90 is 9.0; memory is in bytes; ``driver`` is the CUDA version it offers: 13010 is 13.1."""

    name: str
    capability: int
    total_bytes: int
    free_bytes: int
    driver: int


def find_gpu(device: DeviceName) -> Gpu:
    """The GPU of that number.

    Raises:
        MissingExtraError: the bindings are not installed.
        InputError: there is no such GPU, or no driver; with CUDA's reason.
    """
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise missing_extra("cuda-bindings", "gpu", f"device {device}")
    from cuda.bindings import runtime

    def call(function: Any, *arguments: Any) -> Any:
        error, *values = function(*arguments)
        if int(error):
            _, text = runtime.cudaGetErrorString(error)
            raise InputError(f"device is {device}, but there is no GPU here: {text.decode()}")
        return values[0] if len(values) == 1 else values

    count = call(runtime.cudaGetDeviceCount)
    if device.index >= count:
        raise InputError(f"device is {device}, but there are {count} GPUs, counted from 0")
    properties = call(runtime.cudaGetDeviceProperties, device.index)
    call(runtime.cudaSetDevice, device.index)
    free, total = call(runtime.cudaMemGetInfo)
    capability = 10 * properties.major + properties.minor
    return Gpu(properties.name.decode().rstrip("\0"), capability, total, free, call(runtime.cudaDriverGetVersion))


def cuda_text(version: int) -> str:
    """NVIDIA's number of a CUDA version, as people write it."""
    return f"{version // 1000}.{version % 1000 // 10}"
