"""Torch-TensorRT: TensorRT engines made from the exported programs, without ONNX in between; run like the others.

It is there to check the ONNX route, and for operators that ONNX lacks. Torch-TensorRT needs CUDA's PyTorch and a GPU even to be
imported, so that happens when engines are built; running them takes TensorRT alone.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cachec.engines.tensorrt import PlanBuilder, TensorRTFamily
from cachec.engines.tensorrt_library import TENSORRT
from cachec.runtime.build_options import DEFAULTS, BuildOptions, SizeRange, shape_range
from cachec.runtime.builder import Sources
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import EngineError, InputError, MissingExtraError, missing_extra
from cachec.runtime.files import write_file, writing
from cachec.runtime.specs import Signature, TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# what differs from Torch-TensorRT's own choice
SETTINGS: Mapping[str, Any] = {
    "require_full_compilation": True,  # one engine, nothing left to PyTorch
    "min_block_size": 1,
    "truncate_double": True,  # TensorRT has no float64
    "attn_bias_is_causal": False,  # the default takes every mask for a causal one
    "use_fp32_acc": False,  # casts are in the graph, where they belong
    "disable_tf32": True,
    "offload_module_to_cpu": True,
    "assume_dynamic_shape_support": True,
}


class TorchTensorRTEngine(TensorRTFamily):
    """TensorRT 11, built by Torch-TensorRT."""

    name = "torch-tensorrt"
    vendor = TENSORRT

    @classmethod
    def tensor_names(cls, signature: Signature) -> dict[str, str]:
        """Torch-TensorRT numbers the outputs."""
        return {spec.name: f"output{index}" for index, spec in enumerate(signature.outputs)}


class TorchTensorRTBuilder(PlanBuilder):
    """Builds plans from exported programs."""

    def check_build(self, device: DeviceName, precision: str, options: BuildOptions) -> None:
        import_builder()
        self.engine.check_target(device, precision)
        if options.compatibility == "same-capability":
            raise InputError("Torch-TensorRT knows the hardware compatibilities none and ampere-plus only: choose one of them")

    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        from torch.export.passes import move_to_device_pass

        builder: Any = import_builder()
        timing, files = self.timing_file(options, device), self.plan_files(sources, out, device)
        settings = make_settings(builder, options, timing, device)
        if timing is not None:
            with writing(timing):
                timing.parent.mkdir(parents=True, exist_ok=True)
        for name, program in sources.programs().items():
            check_outputs(name, program)
            inputs = {spec.name: _input(builder, spec, options.sizes) for spec in sources.signatures[name].inputs}
            try:
                plan = builder.dynamo.convert_exported_program_to_serialized_trt_engine(
                    move_to_device_pass(program, str(device)), arg_inputs=[], kwarg_inputs=inputs, **settings
                )
            except Exception as error:  # its exceptions share no base class but Exception
                raise EngineError(f"Torch-TensorRT cannot build the {name} engine: {' '.join(str(error).split())}") from error
            write_file(files[name], plan)
        return files


def import_builder() -> ModuleType:
    """The module ``torch_tensorrt``.

    Raises:
        MissingExtraError: it is not installed, or cannot be imported; with its reason.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise missing_extra("torch_tensorrt", "torch-tensorrt", "building for torch-tensorrt")
    try:
        return importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise MissingExtraError(
            f"torch_tensorrt is installed but cannot be imported: {error}. It needs PyTorch for CUDA, TensorRT's libraries and "
            "a GPU with its driver: take --target tensorrt, which builds from ONNX files"
        ) from error


def make_settings(builder: Any, options: BuildOptions, timing: Path | None, device: DeviceName) -> dict[str, Any]:
    """All settings of a build.

    Torch-TensorRT ignores names that it does not know, so that a misspelt one would never be noticed.

    Raises:
        InputError: this version of Torch-TensorRT does not know one of them.
    """
    settings = {
        **SETTINGS,
        "device": builder.Device(f"cuda:{device.index}"),
        "optimization_level": options.level,
        "workspace_size": options.workspace or 0,
        "hardware_compatible": options.compatibility == "ampere-plus",
        **({} if timing is None else {"timing_cache_path": str(timing)}),
    }
    known = {field.name for field in dataclasses.fields(builder.dynamo.CompilationSettings)}
    if unknown := settings.keys() - known:
        raise InputError(
            f"Torch-TensorRT {builder.__version__} does not know the setting {', '.join(sorted(unknown))}: install 2.13, "
            "or take --target tensorrt"
        )
    return settings


def check_outputs(name: str, program: "ExportedProgram") -> None:
    """Raise ``EngineError`` if a value is given twice: Torch-TensorRT would number it once."""
    outputs = program.graph_signature.user_outputs
    if len(set(outputs)) != len(outputs):
        raise EngineError(
            f"the {name} graph gives one value under two names, which Torch-TensorRT cannot: take --target tensorrt"
        )


def _input(builder: Any, spec: TensorSpec, sizes: Mapping[str, SizeRange]) -> Any:
    import torch

    least, usual, most = shape_range(spec, sizes)
    dtype = getattr(torch, spec.dtype)
    if least == most:
        return builder.Input(shape=most, dtype=dtype)
    return builder.Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=dtype)


ENGINE = TorchTensorRTEngine
BUILDER = TorchTensorRTBuilder(  # version-compatible engines would lack their runtime
    TorchTensorRTEngine, ("level", "workspace", "compatibility")
)
