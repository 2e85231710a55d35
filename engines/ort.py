"""ONNX Runtime on the CPU and on NVIDIA GPUs.

It runs the ONNX files of a bundle (``engines.onnx_files``) as they are, with I/O binding straight onto the session's buffers;
neither torch nor onnx is loaded. On a GPU all engines work in one stream without waiting for the host, and
each call is recorded as a CUDA graph when it is made for the second time.
"""

import importlib.util
import itertools
import logging
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from cachec.engines.cuda_device import CudaBuffer, CudaDevice, cuda_device
from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.device import CPU, CUDA, Buffer, Device, DeviceName, Host
from cachec.runtime.engine import HOST, ON_HOST, ONNX, Call, Engine, ExecutionContext, LoadOptions, check_bindings
from cachec.runtime.errors import BundleError, EngineError, InputError, in_one_line, missing_extra, shortened
from cachec.runtime.host_memory import num_cores
from cachec.runtime.specs import BFLOAT16, Signature

if importlib.util.find_spec("onnxruntime") is None:
    raise missing_extra("onnxruntime", "cpu", "the ort backend")
import onnxruntime

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
GRAPH_ID = "gpu_graph_id"  # run option; calls with the same one are one CUDA graph
NO_GRAPH = -1
ONNX_BFLOAT16 = 16  # of onnx.TensorProto.DataType; numpy has no name for it

NO_MEMORY = ("Failed to allocate memory", "out of memory", "bad_alloc")  # in ONNX Runtime's messages


class OrtFamily(Engine):
    """An ``InferenceSession``, with one execution provider or another on a GPU. Other weights are other ONNX files."""

    needs_same_version = False  # an ONNX file is a standard

    @classmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], options: LoadOptions = ON_HOST
    ) -> dict[str, Self]:
        _start_thread_pool(options.threads)
        files = {name: options.weights.get(name, path) for name, path in files.items()}
        if options.device.kind == CPU:
            host = Host()
            return {name: cls(open_session(path, [CPU_PROVIDER]), signatures[name], host) for name, path in files.items()}
        onnxruntime.preload_dlls()  # finds CUDA where pip put it
        gpu = cuda_device(options.device)
        return {name: cls(cls.open_on_gpu(path, gpu), signatures[name], gpu) for name, path in files.items()}

    @classmethod
    @abstractmethod
    def open_on_gpu(cls, path: Path, device: CudaDevice) -> onnxruntime.InferenceSession:
        """A session that works in the device's stream."""

    def _context(self, native: Any, device: Device) -> ExecutionContext:
        return OrtContext(native, self.signature, device)

    @classmethod
    def version(cls) -> str:
        return str(onnxruntime.__version__)


class OrtEngine(OrtFamily):
    """ONNX Runtime's own kernels, on the CPU or on CUDA."""

    name = "ort"

    @classmethod
    def weights_form(cls, needs: Mapping[str, Any]) -> str | None:
        return ONNX

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        if device.kind == CUDA:
            check_provider(CUDA_PROVIDER, device)
            cuda_device(device)
        elif precision == BFLOAT16:
            raise InputError("bfloat16 is what ONNX Runtime has no kernels for on the CPU: use --device cuda or float16")

    @classmethod
    def rows_are_exact(cls, device: DeviceName) -> bool:
        return device.kind == CPU  # as measured, with one thread and two

    @classmethod
    def open_on_gpu(cls, path: Path, device: CudaDevice) -> onnxruntime.InferenceSession:
        """With CUDA graphs if its operators allow."""
        options = cuda_options(device)
        try:
            session = open_session(path, [(CUDA_PROVIDER, {**options, "enable_cuda_graph": "1"})])
        except BundleError as error:  # an operator that only the CPU has, say; or something worse, which comes again
            session = open_session(path, [(CUDA_PROVIDER, options)])
            log.warning("calls of %s are made without CUDA graphs: %s", path.name, error)
        check_started(session, CUDA_PROVIDER, device)
        return session


def check_provider(provider: str, device: DeviceName) -> None:
    """Raise ``InputError`` unless the installed ONNX Runtime was built with an execution provider."""
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise InputError(
            f"device is {device}, but {provider} is not among onnxruntime.get_available_providers(), which are "
            f"{', '.join(available)}: replace onnxruntime by onnxruntime-gpu (cachec[gpu]), or use --device cpu"
        )


def cuda_options(device: CudaDevice) -> dict[str, str]:
    """Options of the CUDA provider: this GPU, in the device's stream, float32 as it is."""
    return {"device_id": str(device.index), "user_compute_stream": str(device.stream), "use_tf32": "0"}


def check_started(session: onnxruntime.InferenceSession, provider: str, device: Device) -> None:
    """Raise ``EngineError`` unless a session has its provider: ONNX Runtime only logs that a library is missing."""
    if provider not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot start {provider} on {device.name}: a library is missing "
            "or of another version (pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )


_pool_threads: list[int] = []  # of the one pool that ONNX Runtime has in this process


def _start_thread_pool(threads: int | None) -> None:
    """Let all engines of the process share one thread pool.

    With a pool each, the idle engine's threads spin while the other one runs, and take its cores.

    Raises:
        InputError: the pool runs already, with another number of threads.
    """
    if not _pool_threads:
        wanted = threads or num_cores()
        onnxruntime.set_global_thread_pool_sizes(wanted, 1)
        _pool_threads.append(wanted)
    elif threads not in (None, _pool_threads[0]):
        raise InputError(
            f"threads is {threads}, but ONNX Runtime already runs with {_pool_threads[0]} in this process: "
            "all bundles of a process share its threads, so ask for the same number"
        )


def open_session(path: Path, providers: list[Any]) -> onnxruntime.InferenceSession:
    """A session of an ONNX file, on the process's one thread pool; no other providers are tried than the given ones."""
    _start_thread_pool(None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        if any(words in str(error) for words in NO_MEMORY):
            raise EngineError(
                f"there is no memory for the engine {path.name} and its weights: {in_one_line(error, 400)}"
            ) from error
        raise BundleError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {in_one_line(error, 400)}") from error


class OrtContext(ExecutionContext):
    """Binds buffers by their addresses.

    Raises:
        BundleError: names or sizes of the signature's inputs and outputs are not the session's.
    """

    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature, device: Device) -> None:
        for said, there in ((signature.inputs, session.get_inputs()), (signature.outputs, session.get_outputs())):
            if strange := {spec.name for spec in said} ^ {one.name for one in there}:
                raise BundleError(
                    f"the manifest and an ONNX file do not agree on {shortened(min(strange))}: compile the bundle again"
                )
            shapes = {one.name: one.shape for one in there}
            for spec in said:
                if not _may_be(spec.shape, shapes[spec.name]):
                    raise BundleError(
                        f"{shortened(spec.name)} of an ONNX file is {shortened(shapes[spec.name])}, which is not the "
                        f"manifest's {shortened(list(spec.shape))}: compile the bundle again"
                    )
        self._session = session
        self._signature, self._device = signature, device
        self._place = DeviceName.parse(device.name)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        check_bindings(self._signature, self._device, inputs, outputs)
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_input(name, *self._where(buffer))
        for name, buffer in outputs.items():
            binding.bind_output(name, *self._where(buffer))
        kind = _OrtCall if self._place.kind == CPU else GraphedCall
        return kind(self._session, binding, (*inputs.values(), *outputs.values()))

    def _where(self, buffer: Buffer) -> tuple[Any, ...]:
        element = ONNX_BFLOAT16 if buffer.dtype == BFLOAT16 else np.dtype(buffer.dtype)
        address = buffer.pointer if isinstance(buffer, CudaBuffer) else buffer.ctypes.data
        return self._place.kind, self._place.index, element, buffer.shape, address


def _may_be(said: Sequence[int | str], there: Sequence[int | str | None]) -> bool:
    """Are these shapes the same where both are numbers?"""
    sizes = ((one, other) for one, other in zip(said, there, strict=False) if isinstance(one, int) and isinstance(other, int))
    return len(said) == len(there) and all(one == other for one, other in sizes)


_graph_ids = itertools.count(1)
_told: "weakref.WeakSet[onnxruntime.InferenceSession]" = weakref.WeakSet()  # engines whose calls cannot be captured


class GraphedCall(Call):
    """A call that is queued on the GPU. The first time it is made as it is, from the second on as a CUDA graph.

    ONNX Runtime records a graph after running a call some more times, so that a session for one request would pay for nothing.
    """

    def __init__(self, session: onnxruntime.InferenceSession, binding: Any, buffers: tuple[Buffer, ...]) -> None:
        self._session, self._binding, self._buffers = session, binding, buffers
        self._graph = next(_graph_ids)
        self._options, self._captures = _run_options(NO_GRAPH), False  # whether this run captures the graph
        self._next = (
            self._graph if session.get_provider_options().get(CUDA_PROVIDER, {}).get("enable_cuda_graph") == "1" else None
        )

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            if not self._captures:
                raise _failed_call(error, self._buffers) from error
            self._go_on_without(error)
        self._captures = False
        if self._next is not None:
            self._options, self._captures, self._next = _run_options(self._next), True, None
            weakref.finalize(self, self._session.release_captured_graph, self._graph).atexit = False

    def _go_on_without(self, error: Exception) -> None:
        """Say once an engine why its calls cannot be captured, and make this one as it is."""
        if self._session not in _told:
            log.warning("calls are made without CUDA graphs, since one cannot be captured: %s", in_one_line(error, 400))
            _told.add(self._session)
        self._options = _run_options(NO_GRAPH)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as again:  # onnxruntime's exceptions share no base class but Exception
            raise _failed_call(again, self._buffers) from again


def _run_options(graph: int) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream keeps the order
    return options


class _OrtCall(Call):
    def __init__(self, session: onnxruntime.InferenceSession, binding: Any, buffers: tuple[Buffer, ...]) -> None:
        self._run: Any = session.run_with_iobinding
        self._binding = binding
        self._buffers = buffers  # the binding knows addresses only

    def run(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise _failed_call(error, self._buffers) from error


def _failed_call(error: Exception, buffers: tuple[Buffer, ...]) -> EngineError:
    size = sum(buffer.nbytes for buffer in buffers) / 1e6
    return EngineError(
        f"ONNX Runtime cannot run a call with {size:.1f} MB of inputs and outputs: {in_one_line(error, 400)}. If memory is "
        "short, take a smaller batch: cachec inspect shows what one sample takes"
    )


class OrtBuilder(EngineBuilder):
    """Builds nothing: the bundle's ONNX files are the engines."""

    def check_build(self, device: DeviceName, precision: str, options: BuildOptions) -> None:
        """Writing files needs no kernels for them: those in bfloat16 can be made on a CPU that cannot run them."""
        if device.kind == CUDA:
            self.engine.check_target(device, precision)

    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        return dict(sources.onnx())


ENGINE = OrtEngine
BUILDER = OrtBuilder(OrtEngine)
