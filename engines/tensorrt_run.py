"""Running TensorRT engines without torch: numpy, the library, and CUDA. The vendor's calls at run time are all in this file.

A session has one stream and one arena. In the arena lie its buffers, which are bound to the engines as they are, and the
scratch memory, which all its contexts share, since they never run at once. The first call on a set of buffers is made as it
is, the second is recorded as a CUDA graph; where all of a request is recorded (``Device.record``), calls are only queued.
"""

import logging
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cachec.engines.cuda_device import CudaBuffer, CudaDevice
from cachec.engines.tensorrt_library import Reports, dtypes_of, reports_of
from cachec.runtime.device import ALIGNMENT, Buffer
from cachec.runtime.engine import Call, ExecutionContext, check_bindings
from cachec.runtime.errors import BundleError, EngineError, InputError
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Native:
    """A loaded engine. ``names``: what the engine calls our tensors, where it calls them otherwise."""

    library: ModuleType
    runtime: "trt.Runtime"  # lives as long as its engines
    engine: "trt.ICudaEngine"
    names: Mapping[str, str] = field(default_factory=dict)


def load_native(
    library: ModuleType,
    path: Path,
    signature: Signature,
    *,
    onnx: Path | None = None,
    host_code: bool = False,
    names: Mapping[str, str] | None = None,
) -> Native:
    """Load an engine. ``onnx``: where its weights are, if it has none, or is to have others.

    ``host_code``: it may bring code for the host.

    Raises:
        BundleError: the file is no engine of this version and GPU, lacks weights, or takes and gives something else.
    """
    if not path.stat().st_size:
        raise BundleError(f"{path.name} is empty: build it again with cachec add-target --force")
    reports = reports_of(library)
    reports.clear()
    with reports.explaining(f"start {library.__name__}"):
        runtime: trt.Runtime = library.Runtime(reports.logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(f"{path.name}: {reports.error('load this engine')}. Build it again with cachec add-target --force")
    if engine.refittable:
        _refit(library, engine, path, onnx, reports)
    native = Native(library, runtime, engine, names or {})
    _check_tensors(native, signature, path)
    return native


def _refit(library: ModuleType, engine: "trt.ICudaEngine", path: Path, onnx: Path | None, reports: Reports) -> None:
    """Give an engine the weights that it was built without, or others than it was built with."""
    with reports.explaining(f"load weights into {path.name}"):
        refitter: trt.Refitter = library.Refitter(engine, reports.logger)
    if onnx is None:
        if refitter.get_missing_weights():
            raise BundleError(
                f"{path.name} was built without weights, and the bundle names none for it: compile the bundle again"
            )
        return
    with reports.explaining(f"load the weights of {onnx.name}"):
        parser: trt.OnnxParserRefitter = library.OnnxParserRefitter(refitter, reports.logger)
    if not parser.refit_from_file(str(onnx)):
        found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BundleError(f"{path.name} does not take the weights of {onnx.name}: {'; '.join(found)}: build it again")
    if missing := refitter.get_missing_weights():
        raise BundleError(f"{path.name} needs weights that {onnx.name} does not have, {', '.join(missing[:5])}: build it again")
    if not refitter.refit_cuda_engine():
        raise BundleError(f"{path.name}: {reports.error(f'load the weights of {onnx.name}')}")


def _check_tensors(native: Native, signature: Signature, path: Path) -> None:
    """Raise ``BundleError`` unless the engine takes and gives what the signature says."""
    engine, library = native.engine, native.library
    dtypes, modes = dtypes_of(library), {library.TensorIOMode.INPUT: "input", library.TensorIOMode.OUTPUT: "output"}
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        rank = len(engine.get_tensor_shape(name))
        found[name] = (modes[engine.get_tensor_mode(name)], dtypes.get(engine.get_tensor_dtype(name)), rank)
    wanted = {
        native.names.get(spec.name, spec.name): (mode, spec.dtype, len(spec.shape))
        for mode, specs in (("input", signature.inputs), ("output", signature.outputs))
        for spec in specs
    }
    if found != wanted:
        raise BundleError(f"{path.name} has the tensors {found}, the manifest says {wanted}: compile the bundle again")


Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Addresses = tuple[tuple[str, int], ...]
GraphKey = tuple[Shapes, Addresses]  # what a recorded graph is good for


class TensorRTContext(ExecutionContext):
    """Runs one engine for one session.

    For each set of shapes it has an execution context of TensorRT's, since a recorded graph is only good as long as its
    context keeps the shapes.
    """

    scratch: CudaBuffer | None = None

    def __init__(self, native: Native, signature: Signature, device: CudaDevice) -> None:
        self._native, self._signature, self._device = native, signature, device
        self._contexts: dict[Shapes, _Shaped] = {}
        self._graphs: dict[GraphKey, Call] = {}
        self._own: dict[tuple[str, tuple[int, ...]], CudaBuffer] = {}

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self._shaped(tuple(sorted(shapes.items()))).scratch_bytes

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        check_bindings(self._signature, self._device, inputs, outputs)
        shapes = tuple(sorted((name, tuple(buffer.shape)) for name, buffer in inputs.items()))
        shaped = self._shaped(shapes)
        shaped.take(self.scratch)
        sizes = sizes_of(self._signature, inputs)
        results = dict(outputs)
        for spec in self._signature.outputs:  # what nobody asked for needs a place, too
            if spec.name not in results:
                results[spec.name] = self._own_buffer(spec.name, spec.resolve(sizes), spec.dtype)
        copies_in, given = self._aligned(inputs)
        copies_out, taken = self._aligned(results)
        addresses = tuple((self._native.names.get(name, name), b.pointer) for name, b in {**given, **taken}.items())
        steps = Steps(
            before=copies_in,
            enqueue=lambda: shaped.enqueue(addresses, self._device.stream),
            after=[(source, target) for target, source in copies_out],
        )
        return TensorRTCall(steps, self._device, self._graphs, (shapes, addresses))

    def _shaped(self, shapes: Shapes) -> "_Shaped":
        if shapes not in self._contexts:
            with self._device.current():
                self._contexts[shapes] = _Shaped(self._native, shapes, self._device)
        return self._contexts[shapes]

    def _aligned(self, buffers: Mapping[str, CudaBuffer]) -> tuple[list[tuple[CudaBuffer, CudaBuffer]], dict[str, CudaBuffer]]:
        """Buffers at addresses that TensorRT takes: themselves, or copies; and which are copies of which."""
        copies, result = [], dict(buffers)
        for name, buffer in buffers.items():
            if buffer.pointer % ALIGNMENT:
                result[name] = self._own_buffer(name, tuple(buffer.shape), buffer.dtype)
                copies.append((buffer, result[name]))
                log.info("%s lies at an odd address and is copied with every call", name)
        return copies, result

    def _own_buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        """A buffer that all calls may use in turn, since they come one after the other."""
        if (name, shape) not in self._own:
            self._own[name, shape] = self._device.empty(shape, dtype)
        return self._own[name, shape]


class _Shaped:
    """An execution context whose input shapes are set once. ``scratch_bytes``: what its calls need beside their buffers."""

    def __init__(self, native: Native, shapes: Shapes, device: CudaDevice) -> None:
        self._reports = reports_of(native.library)
        self._reports.clear()
        strategy = native.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext | None = native.engine.create_execution_context(strategy)
        if context is None:
            raise self._reports.error("make an execution context")
        self._context: trt.IExecutionContext = context
        device.keep(context, owner=self)  # calls may still be queued when the session is gone
        self._scratch: CudaBuffer | None = None
        for name, shape in shapes:
            if not context.set_input_shape(native.names.get(name, name), shape):
                raise self._reports.error(f"take {name} of shape {list(shape)}, which this engine was not built for")
        with self._reports.explaining("infer shapes"):
            missing = context.infer_shapes()
        if missing:
            raise EngineError(f"shapes of {', '.join(missing)} are not known once the inputs are: compile the bundle again")
        self.scratch_bytes = 0
        if native.engine.device_memory_size_v2:  # of the largest shapes that it takes
            self.scratch_bytes = int(context.update_device_memory_size_for_shapes())
            if not self.scratch_bytes:
                raise self._reports.error("tell how much scratch memory a call takes")
        self._bound: Addresses = ()

    def take(self, scratch: CudaBuffer | None) -> None:
        """Use this scratch memory.

        Raises:
            InputError: it is too little.
        """
        given = 0 if scratch is None else scratch.nbytes
        if given < self.scratch_bytes:
            raise InputError(f"a call needs {self.scratch_bytes} bytes of scratch memory, got {given}")
        if scratch is not None and self.scratch_bytes and scratch is not self._scratch:
            self._context.set_device_memory(scratch.pointer, scratch.nbytes)
            self._scratch = scratch  # kept alive: the context knows its address only

    def enqueue(self, addresses: Addresses, stream: int) -> None:
        """Queue a call on these addresses."""
        context = self._context
        if addresses != self._bound:
            for name, address in addresses:
                if not context.set_tensor_address(name, address):
                    raise self._reports.error(f"bind {name}")
            self._bound = addresses
        if not context.execute_async_v3(stream):
            self._bound = ()
            raise self._reports.error("run a call")


@dataclass(frozen=True)
class Steps:
    """What a call is made of: copies to aligned addresses, the call itself, copies back. Mostly there are no copies."""

    before: list[tuple[CudaBuffer, CudaBuffer]]
    enqueue: Callable[[], None]
    after: list[tuple[CudaBuffer, CudaBuffer]]

    def queue(self, device: CudaDevice) -> None:
        """Queue all of it."""
        for source, target in self.before:
            device.upload(source, target)
        with device.current():
            self.enqueue()
        for source, target in self.after:
            device.upload(source, target)


class TensorRTCall(Call):
    """A call on fixed buffers: made once as it is, then recorded. Calls of one shape on the same addresses share a graph."""

    def __init__(self, steps: Steps, device: CudaDevice, graphs: dict[GraphKey, Call], key: GraphKey) -> None:
        self._steps, self._device, self._graphs, self._key = steps, device, graphs, key
        self._warm = self._refused = False

    def run(self) -> None:
        if self._device.capturing or self._refused or not self._warm:
            self._warm = True  # what TensorRT does only the first time cannot be recorded
            self._steps.queue(self._device)
            return
        if self._key not in self._graphs:
            try:
                graph = self._device.record(lambda: self._steps.queue(self._device))
            except EngineError as error:
                log.warning("a call is made without a CUDA graph: %s", error)
                self._refused = True
                self._steps.queue(self._device)
                return
            assert graph is not None, "this device records"
            self._graphs[self._key] = graph
        self._graphs[self._key].run()


def sizes_of(signature: Signature, inputs: Mapping[str, Buffer]) -> dict[str, int]:
    """Values of the symbolic sizes, as the inputs have them."""
    return {
        dim: int(size)
        for spec in signature.inputs
        for dim, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
