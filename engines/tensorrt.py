"""TensorRT: built from the bundle's ONNX files, run without torch; and what its two relatives have in common with it.

Importing this file loads neither library, so that it can be asked what is missing.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from cachec.engines import cuda_runtime
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.gpu import Gpu, cuda_text, find_gpu
from cachec.engines.tensorrt_library import TENSORRT, Library
from cachec.engines.tensorrt_run import Native, TensorRTContext, load_native
from cachec.runtime.build_options import DEFAULTS, WORDS, BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.device import CUDA, Device, DeviceName
from cachec.runtime.engine import HOST, ON_HOST, ONNX, Engine, ExecutionContext, LoadOptions
from cachec.runtime.errors import BundleError, EngineError, InputError
from cachec.runtime.room import check_disk, check_memory, in_bytes
from cachec.runtime.specs import BFLOAT16, Signature

log = logging.getLogger(__name__)

LONG_BUILD = 500e6  # bytes of weights; builds of more take minutes, and say first what they need
BFLOAT16_FROM = 80  # compute capability
DISK = (1e7, 1.1)  # engines take at most: bytes, and bytes per byte of weights; bench/ENGINES.md
HOST_MEMORY = (0.4e9, 2.1)  # building them takes: bytes, and bytes per byte of engines, measured with TensorRT for RTX


class TensorRTFamily(Engine):
    """An engine of one of the two libraries, however it was built: how it is checked, loaded and run."""

    vendor: ClassVar[Library]
    needs_same_version = True
    only_device = CUDA

    @classmethod
    def tensor_names(cls, signature: Signature) -> dict[str, str]:
        """What engines call our tensors, where it is something else."""
        return {}

    @classmethod
    def version(cls) -> str:
        return cls.vendor.version()

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
    def weights_form(cls, needs: Mapping[str, Any]) -> str | None:
        return ONNX if needs.get("refittable") else None

    @classmethod
    def is_made_for(cls, needs: Mapping[str, Any], device: DeviceName) -> bool:
        portable = "compatibility" in needs or "version_from" in needs
        return not portable and needs.get("gpu") in (None, find_gpu(device).name)

    @classmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], options: LoadOptions = ON_HOST
    ) -> dict[str, Self]:
        module, there = cls.vendor.load(), CudaDevice(options.device.index, captures=True)
        engines = {}
        with there.current():
            for name, path in files.items():
                native = load_native(
                    module,
                    path,
                    signatures[name],
                    onnx=options.weights.get(name),
                    host_code="version_from" in options.needs,
                    names=cls.tensor_names(signatures[name]),
                )
                engines[name] = cls(native, signatures[name], there)
        return engines

    def _context(self, native: Native, device: Device) -> ExecutionContext:
        assert isinstance(device, CudaDevice)
        return TensorRTContext(native, self.signature, device)


class TensorRTEngine(TensorRTFamily):
    """TensorRT 11."""

    name = "tensorrt"
    vendor = TENSORRT


class PlanBuilder(EngineBuilder):
    """Builds plans: how they are described, and what they are called. A library that names its GPUs needs none to build."""

    bounded = True

    def __init__(self, engine: type[TensorRTFamily], options: Iterable[str]) -> None:
        super().__init__(engine, device_bound=True, options=frozenset(options))
        self.vendor = engine.vendor

    def gpus(self, device: DeviceName) -> tuple[int, ...]:
        """Compute capabilities of the GPUs that plans which are built here run on."""
        return self.vendor.gpus or (find_gpu(device).capability,)

    def needs(self, device: DeviceName, options: BuildOptions) -> dict[str, Any]:
        needs: dict[str, Any] = {"sm": list(self.gpus(device)), "cuda": cuda_text(self.vendor.driver)}
        if not self.vendor.gpus:
            needs["gpu"] = find_gpu(device).name  # tuned for it
        if options.compatibility != DEFAULTS.compatibility:
            needs["compatibility"] = options.compatibility
        if options.version_compatible:
            needs["version_from"] = self.engine.version()
        if options.strip:
            needs["stripped"] = True
        if options.refit:
            needs["refittable"] = True
        return needs

    def tag(self, device: DeviceName) -> str:
        """What names of files say about where they run: ``11.0.0.114_sm90``."""
        return "_".join((self.engine.version(), *(f"sm{sm}" for sm in self.gpus(device))))

    def plan_files(self, sources: Sources, out: Path, device: DeviceName) -> dict[str, Path]:
        """Where the engines go."""
        tag = self.tag(device)
        return {name: out / f"{name}-{tag}-{sources.precision}-{sources.size}.plan" for name in sources.signatures}

    def timing_file(self, options: BuildOptions, device: DeviceName) -> Path | None:
        """Where kernel timings are kept, if they are."""
        if options.timing_cache is None or not self.vendor.keeps_timings:
            return None
        return options.timing_cache / f"{self.vendor.name}-{self.tag(device)}.timing"


class OnnxPlanBuilder(PlanBuilder):
    """Builds from ONNX files."""

    apart = True

    def check_build(self, device: DeviceName, precision: str, options: BuildOptions) -> None:
        if not self.vendor.gpus:
            self.engine.check_target(device, precision)
        self.vendor.check_builder()

    def check_room(self, weights: float, out: Path, device: DeviceName, options: BuildOptions) -> None:
        gpu = None if self.vendor.gpus else find_gpu(device)
        size, memory, what = plan_bytes(weights), build_memory(weights), f"building for {self.engine.name}"
        disk = 0.0 if options.strip else size
        level = logging.WARNING if weights > LONG_BUILD else logging.INFO
        log.log(level, "%s takes up to %s of memory and %s of disk", what, in_bytes(memory), in_bytes(disk))
        check_memory(memory, what, "stop other programs, or run cachec add-target on a larger machine")
        check_disk(out, disk, what)
        if gpu is not None and size > gpu.free_bytes:
            raise EngineError(
                f"{what} takes {in_bytes(size)} of the GPU's memory, and {gpu.name} has {in_bytes(gpu.free_bytes)} free: stop "
                "what else uses it, or take a larger GPU"
            )

    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        from cachec.engines.tensorrt_from_onnx import PlanFromOnnx

        onnx = sources.onnx()
        if options.compatibility != DEFAULTS.compatibility:
            log.warning(
                "hardware compatibility %s costs some speed: some kernels and fusions are left out", options.compatibility
            )
        plan = PlanFromOnnx(
            self.vendor.load(),
            options,
            self.timing_file(options, device),
            partial(self._place, device),
            self.vendor.flags,
        )
        files = self.plan_files(sources, out, device)
        for name, path in files.items():
            plan.build(name, onnx[name], sources.signatures[name], path)
        return files

    def _place(self, device: DeviceName) -> AbstractContextManager[Any]:
        """Makes the GPU that is built for the current one of a thread."""
        return nullcontext() if self.vendor.gpus else cuda_runtime.on_gpu(cuda_runtime.runtime(), device.index)


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


def plan_bytes(weights: float) -> float:
    """Bytes of the engines at most, of a model with so many bytes of weights."""
    return DISK[0] + DISK[1] * weights


def build_memory(weights: float) -> float:
    """Bytes of the host's memory that building them takes at most."""
    return HOST_MEMORY[0] + HOST_MEMORY[1] * plan_bytes(weights)


ENGINE = TensorRTEngine
BUILDER = OnnxPlanBuilder(TensorRTEngine, WORDS)
