"""TensorRT and TensorRT for RTX: built from the bundle's ONNX files, run without torch.

Importing this file loads neither library, so that it can be asked what is missing.
"""

import logging
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cachec.engines import cuda_runtime
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.gpu import Gpu, cuda_text, find_gpu
from cachec.engines.onnx_files import build_onnx
from cachec.engines.tensorrt_build import EngineBuilder
from cachec.engines.tensorrt_library import TENSORRT, TENSORRT_RTX, Library
from cachec.engines.tensorrt_run import Native, TensorRTContext, load_native
from cachec.runtime.build_options import ALL_OPTIONS, BuildOptions, Sources
from cachec.runtime.device import CUDA, Device, DeviceName
from cachec.runtime.engine import DEFAULTS, HOST, NOTHING, Engine, ExecutionContext
from cachec.runtime.errors import BundleError, EngineError, InputError
from cachec.runtime.sizes import size_ranges
from cachec.runtime.specs import BFLOAT16, Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

log = logging.getLogger(__name__)

LONG_BUILD = 500e6  # bytes of weights; builds of more take minutes, and say first what they need
BFLOAT16_FROM = 80  # compute capability
ANY_STEPS, ANY_COMPUTED = 50, 10  # at most, of schedules that engines outside a bundle take, and of those they are tuned for
ANY_SIZES = BuildOptions(sizes=size_ranges(ANY_STEPS, ANY_COMPUTED))
HOST_MEMORY, DISK = (0.4e9, 3.0), (1e7, 1.1)  # a build takes at most: bytes, and bytes per byte of weights; bench/ENGINES.md


class TensorRTFamily(Engine):
    """An engine of one of the two libraries, however it was built: how it is described, checked, loaded and run."""

    vendor: ClassVar[Library]
    tunes: ClassVar[bool]  # for the GPU that builds
    needs_same_version = True
    device_bound = True
    only_device = CUDA
    bounded = True

    @classmethod
    @abstractmethod
    def gpus(cls, device: DeviceName) -> tuple[int, ...]:
        """Compute capabilities of the GPUs that engines which are built here run on."""

    @classmethod
    @abstractmethod
    def tensor_names(cls, signature: Signature) -> dict[str, str]:
        """What engines call our tensors, where it is something else."""

    @classmethod
    def version(cls) -> str:
        return cls.vendor.version()

    @classmethod
    def tag(cls, device: DeviceName) -> str:
        """What names of engine files say about where they run: ``11.0.0.114_sm90``."""
        return "_".join((cls.version(), *(f"sm{sm}" for sm in cls.gpus(device))))

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        cls.vendor.load()
        if device.kind != CUDA:
            raise InputError(f"device is {device}, but {cls.name} runs on NVIDIA GPUs only: use --device cuda")
        _check_gpu(cls.vendor, find_gpu(device), precision)

    @classmethod
    def check_needs(cls, needs: Mapping[str, Any], device: DeviceName) -> None:
        if _numbers(cls.version()) < _numbers(needs.get("version_from", "0")):
            raise BundleError(f"it was built with {cls.name} {needs['version_from']}, here is {cls.version()}")
        if not cls.vendor.can_build() and ("version_from" not in needs or needs.get("stripped")):
            raise BundleError(
                f"{cls.vendor.module_name()} runs only engines that are version-compatible and have their weights: "
                f"install {cls.vendor.modules[0]}"
            )
        gpu = find_gpu(device)
        if not runs_on(gpu.capability, needs):
            built = ", ".join(f"sm_{sm}" for sm in needs["sm"])
            raise BundleError(f"it was built for {built}, and {gpu.name} is sm_{gpu.capability}")

    @classmethod
    def is_made_for(cls, needs: Mapping[str, Any], device: DeviceName) -> bool:
        portable = "compatibility" in needs or "version_from" in needs
        return not portable and needs.get("gpu") in (None, find_gpu(device).name)

    @classmethod
    def needs(cls, device: DeviceName, options: BuildOptions) -> dict[str, Any]:
        needs: dict[str, Any] = {"sm": list(cls.gpus(device)), "cuda": cuda_text(cls.vendor.driver)}
        if cls.tunes:
            needs["gpu"] = find_gpu(device).name
        if options.compatibility != "none":
            needs["compatibility"] = options.compatibility
        if options.version_compatible:
            needs["version_from"] = cls.version()
        if options.strip:
            needs["stripped"] = True
        return needs

    @classmethod
    def load(
        cls,
        files: Mapping[str, Path],
        signatures: Mapping[str, Signature],
        *,
        device: DeviceName = HOST,
        threads: int | None = None,
        weights: Mapping[str, Path] = NOTHING,
        needs: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Self]:
        module, there = cls.vendor.load(), CudaDevice(device.index, captures=True)
        engines = {}
        with there.current():
            for name, path in files.items():
                native = load_native(
                    module,
                    path,
                    signatures[name],
                    onnx=weights.get(name),
                    host_code="version_from" in needs,
                    names=cls.tensor_names(signatures[name]),
                )
                engines[name] = cls(native, signatures[name], there)
        return engines

    def _context(self, native: Native, device: Device) -> ExecutionContext:
        assert isinstance(device, CudaDevice)
        return TensorRTContext(native, self.signature, device)


class BuiltFromOnnx(TensorRTFamily):
    """Engines that are built from ONNX files."""

    @classmethod
    @abstractmethod
    def place(cls, device: DeviceName) -> AbstractContextManager[Any]:
        """Makes the GPU that is built for the current one of a thread."""

    @classmethod
    def tensor_names(cls, signature: Signature) -> dict[str, str]:
        return {}

    @classmethod
    def build(
        cls,
        programs: Mapping[str, "ExportedProgram"],
        signatures: Mapping[str, Signature],
        out: Path,
        *,
        device: DeviceName = HOST,
    ) -> dict[str, Path]:
        """Write ONNX files into ``out``, and engines beside them, for one sample a call and any schedule."""
        onnx = build_onnx(programs, signatures, out)
        builder = EngineBuilder(cls.vendor.load(), ANY_SIZES, None, partial(cls.place, device), cls.vendor.flags)
        return _build_all(builder, onnx, signatures, {name: out / f"{name}.plan" for name in onnx})

    @classmethod
    def build_target(
        cls, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        onnx, tag = sources.onnx(), cls.tag(device)
        check_room(onnx, out, options)
        if options.compatibility != "none":
            log.warning(
                "hardware compatibility %s costs some speed: some kernels and fusions are left out", options.compatibility
            )
        folder = options.timing_cache if cls.vendor.keeps_timings else None
        timing = None if folder is None else folder / f"{cls.name}-{tag}.timing"
        builder = EngineBuilder(cls.vendor.load(), options, timing, partial(cls.place, device), cls.vendor.flags)
        return _build_all(builder, onnx, sources.signatures, plan_files(onnx, tag, sources, out))


def _build_all(
    builder: EngineBuilder, onnx: Mapping[str, Path], signatures: Mapping[str, Signature], files: Mapping[str, Path]
) -> dict[str, Path]:
    for name, path in onnx.items():
        builder.build(name, path, signatures[name], files[name])
    return dict(files)


class TensorRTEngine(BuiltFromOnnx):
    """TensorRT 11: engines for the GPU that builds them."""

    name = "tensorrt"
    vendor = TENSORRT
    tunes = True
    options = frozenset(ALL_OPTIONS)

    @classmethod
    def gpus(cls, device: DeviceName) -> tuple[int, ...]:
        return this_gpu(device)

    @classmethod
    def place(cls, device: DeviceName) -> AbstractContextManager[Any]:
        return cuda_runtime.on_gpu(cuda_runtime.runtime(), device.index)

    @classmethod
    def check_build(cls, device: DeviceName, precision: str, options: BuildOptions) -> None:
        cls.check_target(device, precision)
        cls.vendor.check_builder()


class TensorRTRtxEngine(BuiltFromOnnx):
    """TensorRT for RTX: built without a GPU, finished on the user's when it is loaded."""

    name = "tensorrt-rtx"
    vendor = TENSORRT_RTX
    tunes = False
    options = frozenset(("level", "workspace"))

    @classmethod
    def gpus(cls, device: DeviceName) -> tuple[int, ...]:
        return cls.vendor.gpus

    @classmethod
    def place(cls, device: DeviceName) -> AbstractContextManager[Any]:
        return nullcontext()

    @classmethod
    def check_build(cls, device: DeviceName, precision: str, options: BuildOptions) -> None:
        cls.vendor.check_builder()


def plan_files(names: Iterable[str], tag: str, sources: Sources, out: Path) -> dict[str, Path]:
    """Where the engines of a target go; the names say where they run."""
    return {name: out / f"{name}-{tag}-{sources.precision}-{sources.size}.plan" for name in names}


def this_gpu(device: DeviceName) -> tuple[int, ...]:
    """The compute capability of the GPU that engines are built on, and run on."""
    return (find_gpu(device).capability,)


def runs_on(capability: int, needs: Mapping[str, Any]) -> bool:
    """Does a GPU of this compute capability run engines with these needs?"""
    built, compatibility = needs["sm"], needs.get("compatibility", "none")
    return capability in built or (compatibility == "ampere-plus" and capability >= BFLOAT16_FROM)


def _check_gpu(vendor: Library, gpu: Gpu, precision: str) -> None:
    if gpu.driver < vendor.driver:
        raise InputError(
            f"the driver of {gpu.name} is for CUDA {cuda_text(gpu.driver)}, but {vendor.name} {vendor.major} needs "
            f"{cuda_text(vendor.driver)}: install a newer driver"
        )
    _check_precision(gpu.capability, precision)


def _check_precision(capability: int, precision: str) -> None:
    if precision == BFLOAT16 and capability < BFLOAT16_FROM:
        raise InputError(f"sm_{capability} has no bfloat16: compile with --dtype float16")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_room(onnx: Mapping[str, Path], out: Path, options: BuildOptions) -> None:
    """Say what a build will take, and refuse it if the disk has not so much.

    Raises:
        EngineError: the disk is too full.
    """
    folders = {path.parent for path in onnx.values()}
    weights = sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.suffix in (".onnx", ".bin"))
    memory, disk = (base + share * weights for base, share in (HOST_MEMORY, DISK))
    disk = 0 if options.strip else disk
    free = shutil.disk_usage(out).free
    log.log(
        logging.WARNING if weights > LONG_BUILD else logging.INFO,
        "building takes up to %.2f GB of memory and %.2f GB of disk (%.1f GB are free)",
        memory / 1e9, disk / 1e9, free / 1e9,
    )  # fmt: skip
    if disk > free:
        raise EngineError(f"the engines take about {disk / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left: make room")
