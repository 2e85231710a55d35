"""GPUs by name: memory and peak speed as their makers publish them, and what others measured on them."""

from dataclasses import dataclass

from cachec.runtime.errors import unknown_name


@dataclass(frozen=True)
class GpuFigures:
    """``memory`` in bytes; ``peak`` of dense bfloat16 with sums in float32, in FLOP/s; where both are from."""

    name: str
    memory: float
    peak: float
    source: str


@dataclass(frozen=True)
class Measured:
    """``seconds`` of one computed step of the model ``source`` on a GPU, batch 1, as somebody else published it."""

    source: str
    height: int
    width: int
    gpu: str
    seconds: float
    where: str


GPUS = {
    one.name: one
    for one in (  # data sheets give figures with sparsity, which are twice as high
        GpuFigures("A100", 80e9, 312e12, "NVIDIA A100 data sheet"),
        GpuFigures("H100", 80e9, 989e12, "NVIDIA H100 data sheet, SXM: 1979 with sparsity"),
        GpuFigures("H200", 141e9, 989e12, "NVIDIA H200 data sheet, SXM: 1979 with sparsity"),
        GpuFigures("B200", 180e9, 2250e12, "NVIDIA HGX B200 data sheet: 4500 with sparsity"),
        GpuFigures("L40S", 48e9, 362e12, "NVIDIA L40S data sheet: 733 with sparsity"),
        GpuFigures("RTX-4090", 24e9, 165e12, "NVIDIA Ada GPU architecture whitepaper"),
    )
}
MEASURED = (
    Measured("black-forest-labs/FLUX.1-dev", 1024, 1024, "H100", 0.1289, "sglang's CI baseline, October 2026, without cache"),
)


def get_gpus(name: str | None) -> tuple[GpuFigures, ...]:
    """The GPU of a name, small letters and blanks allowed; all without one.

    Raises:
        InputError: there are no figures of it; says of which there are.
    """
    if name is None:
        return tuple(GPUS.values())
    wanted = name.strip().upper().replace(" ", "-")
    if wanted not in GPUS:
        raise unknown_name("GPU", name, GPUS)
    return (GPUS[wanted],)


def find_measured(source: str, height: int, width: int, gpu: str) -> Measured | None:
    """What was measured there of this model in this size, if anything."""
    wanted = (source, height, width, gpu)
    return next((one for one in MEASURED if (one.source, one.height, one.width, one.gpu) == wanted), None)
