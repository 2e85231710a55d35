"""ONNX Runtime on CPU.

Build: ``torch.onnx`` at opset 23; all engines of a bundle share one weights file, tensors stored once by content.
Run: I/O binding straight onto the session's buffers; neither torch nor onnx is loaded.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cachec.runtime.device import Buffer, Host
from cachec.runtime.engine import Call, Engine, ExecutionContext, check_bindings
from cachec.runtime.errors import BundleError, EngineError, InputError, missing_extra
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

if importlib.util.find_spec("onnxruntime") is None:
    raise missing_extra("onnxruntime", "cpu", "the ort backend")
import onnxruntime

OPSET = 23
ALIGNMENT = 4096  # bytes; of tensors in the weights file, so that it can be mapped
SHARED_FROM = 1024  # bytes; smaller tensors stay inside the ONNX file


class OrtEngine(Engine):
    """An ``InferenceSession`` on the CPU execution provider."""

    name = "ort"
    needs_same_version = False  # an ONNX file is a standard

    @classmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], *, threads: int | None = None
    ) -> dict[str, Self]:
        _start_thread_pool(threads)
        return {name: cls._open(path, signatures[name]) for name, path in files.items()}

    @classmethod
    def _open(cls, path: Path, signature: Signature) -> Self:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.use_per_session_threads = False
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise BundleError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
        return cls(session, signature, Host())

    def _context(self, native: Any) -> ExecutionContext:
        return _OrtContext(native, self.signature)

    @staticmethod
    def version() -> str:
        return str(onnxruntime.__version__)

    @staticmethod
    def build(programs: Mapping[str, "ExportedProgram"], signatures: Mapping[str, Signature], out: Path) -> dict[str, Path]:
        """Write one ONNX file per program and one weights file into ``out``; returns the ONNX files by program name."""
        return build_onnx(programs, signatures, out)


_pool_threads: list[int] = []  # of the one pool that ONNX Runtime has in this process


def _start_thread_pool(threads: int | None) -> None:
    """Let all engines of the process share one thread pool.

    With a pool each, the idle engine's threads spin while the other one runs, and take its cores.

    Raises:
        InputError: the pool runs already, with another number of threads.
    """
    if not _pool_threads:
        wanted = threads or os.cpu_count() or 1
        onnxruntime.set_global_thread_pool_sizes(wanted, 1)
        _pool_threads.append(wanted)
    elif threads not in (None, _pool_threads[0]):
        raise InputError(
            f"threads is {threads}, but ONNX Runtime already runs with {_pool_threads[0]} in this process: "
            "all bundles of a process share its threads, so ask for the same number"
        )


class _OrtContext(ExecutionContext):
    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature) -> None:
        self._session = session
        self._signature = signature

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        check_bindings(self._signature, inputs, outputs)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _OrtCall(self._session, binding, (*inputs.values(), *outputs.values()))


class _OrtCall(Call):
    def __init__(self, session: onnxruntime.InferenceSession, binding: Any, buffers: tuple[Buffer, ...]) -> None:
        self._run: Any = session.run_with_iobinding
        self._binding = binding
        self._buffers = buffers  # the binding knows addresses only

    def run(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            size, reason = sum(buffer.nbytes for buffer in self._buffers) / 1e6, " ".join(str(error).split())
            raise EngineError(
                f"ONNX Runtime cannot run a call with {size:.1f} MB of inputs and outputs: {reason}. If memory is short, take "
                "a smaller batch: cachec inspect shows what one sample takes"
            ) from error


def build_onnx(programs: Mapping[str, "ExportedProgram"], signatures: Mapping[str, Signature], out: Path) -> dict[str, Path]:
    """Write ``<name>.onnx`` per program plus one shared ``weights-<hash>.bin`` into ``out``."""
    import onnx_ir
    import torch

    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell of every pattern that they do not apply
        logging.getLogger(noisy).setLevel(logging.ERROR)
    models: dict[str, Any] = {}
    for name, program in programs.items():
        signature = signatures[name]
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            optimize=True,
            verbose=False,
        )
        models[name] = exported.model  # type: ignore[union-attr]
        _drop_metadata(models[name])
    weights = _share_weights(models, out)
    paths = {}
    for name, model in models.items():
        for value, tensor in weights[name].items():
            model.graph.initializers[value].const_value = tensor
        paths[name] = out / f"{name}.onnx"
        onnx_ir.save(model, paths[name])
    return paths


def _drop_metadata(model: Any) -> None:
    """Drop the exporter's notes: they hold source paths and stack traces of the machine that compiled."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.outputs, *(v for v in node.inputs if v is not None)):
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _share_weights(models: Mapping[str, Any], out: Path) -> dict[str, dict[str, Any]]:
    """Write every large initializer once; returns external tensors by model and initializer name."""
    import onnx_ir

    content = bytearray()
    places: dict[str, tuple[int, int]] = {}
    wanted: dict[str, dict[str, tuple[Any, str]]] = {}
    for name, model in models.items():
        wanted[name] = {}
        for key, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.nbytes < SHARED_FROM:
                continue
            data = np.ascontiguousarray(tensor.numpy()).tobytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest not in places:
                content.extend(b"\0" * (-len(content) % ALIGNMENT))
                places[digest] = (len(content), len(data))
                content.extend(data)
            wanted[name][key] = (tensor, digest)
    file = out / f"weights-{hashlib.sha256(content).hexdigest()[:16]}.bin"
    file.write_bytes(content)
    return {
        name: {
            key: onnx_ir.ExternalTensor(
                file.name, *places[digest], tensor.dtype, shape=tensor.shape, name=key, base_dir=str(out)
            )
            for key, (tensor, digest) in tensors.items()
        }
        for name, tensors in wanted.items()
    }
