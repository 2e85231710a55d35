"""ONNX files at opset 23, all of a bundle over one weights file: what ONNX Runtime runs and TensorRT builds from."""

import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.runtime.errors import missing_extra
from cachec.runtime.files import writing
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

log = logging.getLogger(__name__)

OPSET = 23
ALIGNMENT = 4096  # bytes; of tensors in the weights file, so that it can be mapped
SHARED_FROM = 1024  # bytes; smaller tensors stay inside the ONNX file


def build_onnx(programs: Mapping[str, "ExportedProgram"], signatures: Mapping[str, Signature], out: Path) -> dict[str, Path]:
    """Write ``<name>.onnx`` per program plus one shared ``weights-<hash>.bin`` into ``out``."""
    for package in ("onnx_ir", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "compile", "writing ONNX files")
    import onnx_ir

    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell of every pattern that they do not apply
        logging.getLogger(noisy).setLevel(logging.ERROR)
    models: dict[str, Any] = {}
    for name, program in programs.items():
        models[name] = _convert(program, signatures[name])
        _drop_metadata(models[name])
    weights = _share_weights(models, out)
    paths = {}
    for name, model in models.items():
        for value, tensor in weights[name].items():
            model.graph.initializers[value].const_value = tensor
        paths[name] = out / f"{name}.onnx"
        with writing(paths[name]):
            onnx_ir.save(model, paths[name])
    return paths


def _convert(program: "ExportedProgram", signature: Signature) -> Any:
    """The ONNX model of a program.

    ``torch.onnx`` traces a program anew to write it in operators that ONNX has functions for. The compiler's graphs are in
    such already, so that is left out, and done only if it turns out that one is not.
    """
    import torch

    from cachec.engines.traced import TracedProgram

    inputs, outputs = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
    for given in (TracedProgram.of(program), program):
        try:
            exported = torch.onnx.export(
                given,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            if given is program:
                raise
            log.info("an operator has no ONNX function: %s", str(error).splitlines()[0])
        else:
            break
    model = exported.model  # type: ignore[union-attr]
    _simplify(model)
    return model


def _simplify(model: Any) -> None:
    """Fold constants and drop what is not read. What engines fuse themselves is not looked for: that takes most of the time."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for one in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        one(model)


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
    """Write every large initializer once; returns external tensors by model and initializer name.

    They go to the file one by one, so that no second copy of the model is in memory.
    """
    import onnx_ir

    places: dict[str, tuple[int, int]] = {}
    wanted: dict[str, dict[str, tuple[Any, str]]] = {}
    whole = hashlib.sha256()
    unnamed = out / "weights.part"
    with writing(unnamed), unnamed.open("wb") as file:
        for name, model in models.items():
            wanted[name] = {}
            for key, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor.nbytes < SHARED_FROM:
                    continue
                data = np.ascontiguousarray(tensor.numpy()).tobytes()
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    padding = b"\0" * (-file.tell() % ALIGNMENT)
                    places[digest] = (file.tell() + len(padding), len(data))
                    for part in (padding, data):
                        whole.update(part)
                        file.write(part)
                wanted[name][key] = (tensor, digest)
    file_name = f"weights-{whole.hexdigest()[:16]}.bin"
    with writing(out / file_name):
        unnamed.rename(out / file_name)
    return {
        name: {
            key: onnx_ir.ExternalTensor(
                file_name, *places[digest], tensor.dtype, shape=tensor.shape, name=key, base_dir=str(out)
            )
            for key, (tensor, digest) in tensors.items()
        }
        for name, tensors in wanted.items()
    }
