"""TensorRT code as it has to be written to be checked: builds an engine from an ONNX file and runs it. Also run on the fake."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt


def messages(library: Any) -> "trt.ILogger":
    class Log(library.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            if severity != library.ILogger.VERBOSE:
                self.lines.append(f"{severity.name}: {msg}")

    return Log()


def progress(library: Any, log: list[str]) -> "trt.IProgressMonitor":
    class Progress(library.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            log.append(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._note(phase_name)

        def _note(self, text: str) -> None:
            log.append(text)

    return Progress()


def build(
    library: Any, logger: "trt.ILogger", model: Path, ranges: Mapping[str, tuple[Any, Any, Any]], log: list[str]
) -> bytes:
    builder = library.Builder(logger)
    network = builder.create_network(0)
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise ValueError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    for attention in attentions(library, network):
        attention.decomposable = True
    config = builder.create_builder_config()
    config.builder_optimization_level = 3
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, pool_size=1 << 20)
    config.set_flag(library.BuilderFlag.STRICT_NANS)
    config.progress_monitor = progress(library, log)
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in ranges.items():
        profile.set_shape(name, low, usual, high)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError("not built")
    return bytes(plan)


def attentions(library: Any, network: "trt.INetworkDefinition") -> Iterator["trt.IAttention"]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == library.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.IAttentionInputLayer
            yield layer.attention


@dataclass
class Loaded:
    library: Any
    engine: "trt.ICudaEngine"
    contexts: dict[str, "trt.IExecutionContext"] = field(default_factory=dict)

    def names(self, mode: "trt.TensorIOMode") -> list[str]:
        every = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        return [name for name in every if self.engine.get_tensor_mode(name) == mode]

    def context(self, scratch: int) -> "trt.IExecutionContext":
        context = self.engine.create_execution_context(self.library.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise MemoryError(f"a context needs {self.engine.device_memory_size_v2} bytes")
        context.set_device_memory(scratch, self.engine.device_memory_size_v2)
        self.contexts["last"] = context
        return context


def load(library: Any, logger: "trt.ILogger", plan: bytes) -> Loaded:
    engine = library.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError("no plan of this TensorRT")
    return Loaded(library, engine)


def run(loaded: Loaded, scratch: int, shapes: Mapping[str, tuple[int, ...]], pointers: Mapping[str, int], stream: int) -> bool:
    context = loaded.context(scratch)
    for name, shape in shapes.items():
        context.set_input_shape(name, shape)
    for name, pointer in pointers.items():
        context.set_tensor_address(name, pointer)
    return not context.infer_shapes() and loaded.contexts["last"].execute_async_v3(stream)
