"""From ONNX files to plans, as TensorRT calls built engines.

Networks are strongly typed: precision is what the graph says, and no flag changes it. Symbolic sizes that can only be one
number are fixed, the others get one optimisation profile.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from cachec.engines.tensorrt_library import Reports, dtypes_of, reports_of
from cachec.runtime.abi import COMPUTE
from cachec.runtime.build_options import BuildOptions, shape_range
from cachec.runtime.errors import EngineError
from cachec.runtime.files import write_file
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)
T = TypeVar("T")

COMPATIBILITY = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}


@dataclass(frozen=True)
class PlanFromOnnx:
    """Builds plans with one library and one set of options. ``timing``: file with kernel timings, which is added to.

    ``place`` makes the GPU that is built for the current one of a thread. ``flags``: more of the library's builder.
    """

    library: ModuleType
    options: BuildOptions
    timing: Path | None = None
    place: Callable[[], AbstractContextManager[Any]] = nullcontext
    flags: tuple[str, ...] = ()

    def build(self, name: str, onnx: Path, signature: Signature, out: Path) -> None:
        """Build the engine of one ONNX file and write it to ``out``. Interrupted, it keeps the timings and writes nothing.

        Raises:
            EngineError: the parser rejects a node, or the builder fails; with the library's reasons.
        """
        start = time.perf_counter()
        draft = in_thread(partial(self._prepare_here, name, onnx, signature), threading.Event())
        with self._timings(draft.config):
            plan = self._run(draft, name)
        if plan is None:
            raise reports_of(self.library).error(f"build the {name} engine")
        write_file(out, memoryview(plan))
        seconds = time.perf_counter() - start
        log.info("%s: %d layers, %.1f MB, %.1f s", name, draft.network.num_layers, plan.nbytes / 1e6, seconds)

    def prepare(self, name: str, onnx: Path, signature: Signature) -> "Draft":
        """Parse an ONNX file and set all options: what is left is the build.

        Raises:
            EngineError: there is no builder here, or the parser rejects a node; with the reason.
        """
        reports = reports_of(self.library)
        reports.clear()
        builder = self._builder(reports)
        network: trt.INetworkDefinition = builder.create_network(0)
        parser = self.library.OnnxParser(network, reports.logger)
        if not parser.parse_from_file(str(onnx)):
            raise EngineError(f"TensorRT's parser rejects {onnx.name}: {_parser_errors(parser)}")
        allow_decomposition(self.library, network)
        shorten_masks(self.library, network)
        part_attention(self.library, network)
        check_borders(self.library, network, signature, onnx)
        config: trt.IBuilderConfig = builder.create_builder_config()
        self._configure(config, name)
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        with reports.explaining(f"set the sizes that the {name} engine takes"):
            varies = self._set_sizes(network, profile, signature)
        if varies:
            config.add_optimization_profile(profile)
        return Draft(builder, network, config, profile)

    def _builder(self, reports: Reports) -> "trt.Builder":
        with reports.explaining("start TensorRT's builder, which needs a GPU and its driver"):
            return self.library.Builder(reports.logger)

    def _configure(self, config: "trt.IBuilderConfig", name: str) -> None:
        flags, options = self.library.BuilderFlag, self.options
        config.builder_optimization_level = options.level
        config.clear_flag(flags.TF32)  # float32 in the graph means float32
        for flag in self.flags:
            config.set_flag(flags.__members__[flag])
        # a call then takes scratch memory for the sizes that it has, not for the largest
        config.set_preview_feature(self.library.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
        if options.workspace is not None:
            config.set_memory_pool_limit(self.library.MemoryPoolType.WORKSPACE, options.workspace)
        if options.refit:
            config.set_flag(flags.REFIT)
        elif options.strip:  # whose results are undefined with other weights than these
            config.set_flag(flags.REFIT_IDENTICAL)
        if options.strip:
            config.set_flag(flags.STRIP_PLAN)
        if options.version_compatible:
            config.set_flag(flags.VERSION_COMPATIBLE)
        if options.compatibility != "none":
            levels = self.library.HardwareCompatibilityLevel
            config.hardware_compatibility_level = levels.__members__[COMPATIBILITY[options.compatibility]]
        if name != COMPUTE:  # small: other streams would cost more than they bring
            config.max_aux_streams = 0

    def _set_sizes(self, network: "trt.INetworkDefinition", profile: "trt.IOptimizationProfile", signature: Signature) -> bool:
        """Fix sizes that can only be one number, and give ranges for the others. Are there any?"""
        varies = False
        for index in range(network.num_inputs):
            tensor: trt.ITensor = network.get_input(index)
            least, usual, most = shape_range(signature.input(tensor.name), self.options.sizes)
            tensor.shape = tuple(a if a == b else -1 for a, b in zip(least, most, strict=True))
            if least != most:
                profile.set_shape(tensor.name, least, usual, most)
                varies = True
        return varies

    @contextmanager
    def _timings(self, config: "trt.IBuilderConfig") -> Iterator[None]:
        """Start from the kernel timings of earlier builds and keep those of this one, however it ends."""
        if self.timing is None:
            yield
            return
        known = self.timing.read_bytes() if self.timing.is_file() else b""
        with self.place():  # the cache is of the current GPU
            cache: trt.ITimingCache | None = config.create_timing_cache(known)
            if cache is None or not config.set_timing_cache(cache, False):
                log.warning("kernel timings in %s are of another GPU or version: measured anew", self.timing.name)
                config.set_timing_cache(config.create_timing_cache(b""), False)
        try:
            yield
        finally:
            write_file(self.timing, memoryview(config.get_timing_cache().serialize()))

    def _run(self, draft: "Draft", name: str) -> "trt.IHostMemory | None":
        """Build; Ctrl-C stops the builder at its next step."""
        cancelled = threading.Event()
        draft.config.progress_monitor = make_monitor(self.library, name, cancelled)
        return in_thread(partial(self._run_here, draft), cancelled)

    def _prepare_here(self, name: str, onnx: Path, signature: Signature) -> "Draft":
        with self.place():  # each thread begins with the first GPU
            return self.prepare(name, onnx, signature)

    def _run_here(self, draft: "Draft") -> "trt.IHostMemory | None":
        with self.place():
            return draft.builder.build_serialized_network(draft.network, draft.config)


@dataclass(frozen=True, eq=False)
class Draft:
    """A network with all that its build needs; the builder lives as long as what it made."""

    builder: "trt.Builder"
    network: "trt.INetworkDefinition"
    config: "trt.IBuilderConfig"
    profile: "trt.IOptimizationProfile"


def in_thread(work: Callable[[], T], cancelled: threading.Event) -> T:
    """What ``work`` returns, done in a thread, so that this one hears Ctrl-C; ``cancelled`` is then set, and the thread ends.

    In a thread that the library calls back into, it would swallow what Ctrl-C raises.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(work).result()
        except KeyboardInterrupt:
            cancelled.set()
            raise


def make_monitor(library: ModuleType, name: str, cancelled: threading.Event) -> "trt.IProgressMonitor":
    """Shows the builder's phases, on a terminal as a progress bar; stops the build when ``cancelled`` is set."""

    class Progress(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._bars: dict[str, tqdm] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            log.debug("%s: %s", name, phase_name)
            if parent_phase is None or parent_phase in self._bars:
                depth = len(self._bars)
                bar = tqdm(total=num_steps, desc=f"{name}: {phase_name}", position=depth, leave=False, disable=None)
                self._bars[phase_name] = bar

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._bars:
                self._bars[phase_name].update(step + 1 - self._bars[phase_name].n)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._bars:
                self._bars.pop(phase_name).close()

    return Progress()


def allow_decomposition(library: ModuleType, network: "trt.INetworkDefinition") -> None:
    """Let attention run as several kernels where there is none for all of it, as in float32; else the build would fail."""
    for attention in attentions(library, network):
        attention.decomposable = True


def shorten_masks(library: ModuleType, network: "trt.INetworkDefinition") -> None:
    """Give attention its masks before they are repeated for every query: TensorRT repeats them itself, without memory.

    ``python -m bench.masks`` measures what that saves.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    repeated = {layer.get_output(0).name: layer.get_input(0) for layer in layers if layer.type == library.LayerType.SLICE}
    for attention in attentions(library, network):
        short = repeated.get(attention.mask.name) if attention.mask is not None else None
        if short is not None and short.shape[-2] == 1:
            attention.mask = short


def part_attention(library: ModuleType, network: "trt.INetworkDefinition") -> None:
    """Let no two attentions read the same queries or keys: TensorRT for RTX 1.7.1 crashes while it builds those.

    The later one reads both negated, which is the same to the last bit; in front of the scaling that the parser puts there.

    Raises:
        EngineError: they are read without being scaled, where only one of them could be negated.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    scaled = {layer.get_output(0).name: layer for layer in layers if is_product(library, layer)}
    known: set[str] = set()
    for attention in attentions(library, network):
        given = [attention.get_input(index).name for index in (0, 1)]
        scales = [scaled[name] for name in given if name in scaled]
        names = {layer.get_input(0).name for layer in scales}
        if names & known:
            if len(scales) != len(given):
                raise EngineError(
                    "two attentions read the same queries or keys, which this TensorRT does not scale as others do"
                )
            for layer in scales:
                layer.set_input(0, network.add_unary(layer.get_input(0), library.UnaryOperation.NEG).get_output(0))
        known |= names


def is_product(library: ModuleType, layer: "trt.ILayer") -> bool:
    """Does a layer multiply two tensors?"""
    if layer.type != library.LayerType.ELEMENTWISE:
        return False
    layer.__class__ = library.IElementWiseLayer
    return bool(layer.op == library.ElementWiseOperation.PROD)


def attentions(library: ModuleType, network: "trt.INetworkDefinition") -> "Iterator[trt.IAttention]":
    """All attention of a network."""
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        if layer.type == library.LayerType.ATTENTION_INPUT:
            layer.__class__ = library.IAttentionInputLayer
            yield layer.attention


def check_borders(library: ModuleType, network: "trt.INetworkDefinition", signature: Signature, onnx: Path) -> None:
    """Raise ``EngineError`` unless the network takes and gives what the signature says."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    names = dtypes_of(library)
    for side, tensors, specs in (("takes", inputs, signature.inputs), ("gives", outputs, signature.outputs)):
        got = {_tensor_text(library, tensor, names): None for tensor in tensors}
        wanted = {f"{spec.dtype} {spec.name} of rank {len(spec.shape)}": None for spec in specs}
        if got.keys() != wanted.keys():
            raise EngineError(
                f"{onnx.name}, as TensorRT reads it, {side} {list(got)}, expected {list(wanted)}: compile it again"
            )


def _tensor_text(library: ModuleType, tensor: "trt.ITensor", names: Mapping[object, str]) -> str:
    return f"{names.get(tensor.dtype, 'another type')} {tensor.name} of rank {len(tensor.shape)}"


def _parser_errors(parser: "trt.OnnxParser") -> str:
    found = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        found.append(f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
    return "; ".join(found) or "it does not say why"
