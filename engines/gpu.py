"""What GPU there is."""

from dataclasses import dataclass

from cachec.engines import cuda_runtime
from cachec.runtime.device import CUDA, DeviceName


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``capability`` 90 is 9.0; memory is in bytes; ``driver`` is the newest CUDA that the driver is for: (13, 1)."""

    name: str
    capability: int
    free_bytes: int
    total_bytes: int
    driver: tuple[int, int]


def find_gpu(device: DeviceName) -> Gpu:
    """The GPU of that number.

    Raises:
        MissingExtraError: NVIDIA's bindings are not installed.
        InputError: there is no such GPU, or no driver; says what was looked for.
    """
    index = device.index
    cuda_runtime.check_gpu(index)
    major, minor = cuda_runtime.compute_capability(index)
    memory = cuda_runtime.memory_bytes(index)
    return Gpu(cuda_runtime.gpu_name(index), 10 * major + minor, *memory, cuda_runtime.driver_version())


def check_gpu(device: DeviceName) -> None:
    """Raise as :func:`find_gpu` if ``device`` is a GPU that is not there."""
    if device.kind == CUDA:
        find_gpu(device)


def cuda_text(version: tuple[int, int]) -> str:
    """A CUDA version as people write it."""
    return ".".join(map(str, version))
