"""ONNX files at opset 23, all of a bundle over one weights file: what ONNX Runtime runs and TensorRT builds from.

Weights may be larger than memory: they are read, and what was made of them is evaluated, one by one while they are written.
"""

import functools
import importlib.util
import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cachec.engines.weights_file import Unfinished, WeightsFile
from cachec.runtime.errors import in_one_line, missing_extra
from cachec.runtime.files import writing
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

log = logging.getLogger(__name__)

OPSET = 23
TALKING = ("torch.onnx", "onnxscript", "onnx_ir")  # loggers that tell of every pattern that they do not apply
SHARED_FROM = 1024  # bytes; smaller tensors stay inside the ONNX file


@dataclass(frozen=True)
class OnnxFiles:
    """What was written: a file per ``graph``, and one of ``weights`` with its ``weights_sha256``."""

    graphs: Mapping[str, Path]
    weights: Path
    weights_sha256: str


class NamedWeights(Protocol):
    """Values of weights that programs hold as fake tensors."""

    def key(self, tensor: "torch.Tensor") -> Hashable:
        """The same for weights of the same value, in all processes, and so is its ``repr``."""

    def pieces(self, tensor: "torch.Tensor") -> "Iterable[torch.Tensor]":
        """The value, in tensors on the CPU that are to be joined along the first axis."""


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Let loggers say errors only, for as long as it lasts."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.ERROR, logger.level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@only_errors(*TALKING)
def build_onnx(
    programs: Mapping[str, "ExportedProgram"],
    signatures: Mapping[str, Signature],
    out: Path,
    weights: NamedWeights | None = None,
    unfinished: Unfinished | None = None,
) -> OnnxFiles:
    """Write ``<name>.onnx`` per program plus one shared ``weights-<hash>.bin`` into ``out``.

    ``weights``: the values of what the programs hold as fake tensors, if they do. ``unfinished``: where the weights are until
    all are written; by default in ``out``.

    Raises:
        OutputError: the disk has no room for them, or they cannot be written.
    """
    for package in ("onnx_ir", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "compile", "writing ONNX files")
    import onnx_ir

    models: dict[str, Any] = {}
    for name, program in programs.items():
        models[name] = converted(program, signatures[name], weights)
    file, digest = _share_weights(models, out, unfinished or Unfinished(out, {}))
    paths = {name: out / f"{name}.onnx" for name in models}
    for name, model in models.items():
        with writing(paths[name]):
            onnx_ir.save(model, paths[name])
    return OnnxFiles(paths, file, digest)


@only_errors(*TALKING)
def converted(program: "ExportedProgram", signature: Signature, weights: NamedWeights | None) -> Any:
    """The ONNX model of a program, whose weights are read when their values are wanted.

    ``torch.onnx`` traces a program anew to write it in operators that ONNX has functions for. The compiler's graphs are in
    such already, so that is left out, and done only if it turns out that one is not.
    """
    import torch
    from torch.onnx._internal.exporter import _core

    from cachec.engines.traced import traced

    try:
        model = _translated(traced(program))
    except torch.onnx.OnnxExporterError as error:
        log.info("an operator has no ONNX function: %s", in_one_line(error.__cause__ or error))
        model = _translated(_core._prepare_exported_program_for_export(program, registry=_functions()))
    _name_inputs(model, signature)
    _read_later(model, weights)
    _repeat_masks(model)
    _simplify(model)
    _name_outputs(model, signature)
    _drop_metadata(model)
    return model


def _translated(program: "ExportedProgram") -> Any:
    """What ``torch.onnx.export`` does behind its preparations; it reads its library of ONNX functions anew at every call."""
    from onnxscript.version_converter import convert_version
    from torch.onnx._internal.exporter import _core

    model = _core._exported_program_to_onnx_program(program, registry=_functions()).model
    convert_version(model, OPSET, fallback=True)
    return model


@functools.cache
def _functions() -> Any:
    """PyTorch's ONNX functions for its operators."""
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


def _read_later(model: Any, weights: NamedWeights | None) -> None:
    """Weights that are not in memory become tensors that are read when their values are wanted."""
    import onnx_ir
    from torch._subclasses import FakeTensor

    from cachec.engines.onnx_weights import LateWeight

    for name, value in model.graph.initializers.items():
        tensor = getattr(value.const_value, "raw", None)
        if isinstance(tensor, FakeTensor):
            assert weights is not None, "programs without values come with their weights"
            value.const_value = LateWeight(tensor, weights, value.const_value.dtype, name)
    for node in list(model.graph):
        given = node.inputs[0] if node.op_type == "Transpose" else None
        if given is None or not isinstance(given.const_value, LateWeight):
            continue
        turned = given.const_value.transposed(node.attributes["perm"].as_ints())
        result = node.outputs[0]
        value = onnx_ir.Value(name=result.name, type=result.type, shape=turned.shape, const_value=turned)
        onnx_ir.convenience.replace_all_uses_with(result, value)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(value)


def _repeat_masks(model: Any) -> None:
    """Repeat masks of attention ``[B, 1 or heads, 1, K]`` for every query: ONNX Runtime's CPU kernel takes no others.

    The scores, which it holds too, are larger by the number of heads and of bytes. TensorRT, which would write the mask
    out, is given the short one again (``tensorrt_from_onnx``).
    """
    import onnx_ir

    for node in list(model.graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.shape[-2] != 1 or node.inputs[0].shape[-2] == 1:
            continue
        rows = onnx_ir.node("Shape", [node.inputs[0]], attributes={"start": 2, "end": 3})
        ones = onnx_ir.node("Constant", [], attributes={"value_ints": [1] * (len(mask.shape) - 2)})
        last = onnx_ir.node("Constant", [], attributes={"value_ints": [1]})
        sizes = onnx_ir.node("Concat", [n.outputs[0] for n in (ones, rows, last)], attributes={"axis": 0})
        full = onnx_ir.node("Expand", [mask, sizes.outputs[0]])
        model.graph.insert_before(node, [rows, ones, last, sizes, full])
        full.outputs[0].type = mask.type
        full.outputs[0].shape = onnx_ir.Shape([*mask.shape[:-2], node.inputs[0].shape[-2], mask.shape[-1]])
        node.replace_input_with(3, full.outputs[0])


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


def _name_inputs(model: Any, signature: Signature) -> None:
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        value.name = spec.name


def _name_outputs(model: Any, signature: Signature) -> None:
    """Give outputs their names: two that are the same value were made one, and an alias of it."""
    for number, value in enumerate(model.graph.outputs):  # as no two values may have one name on the way
        value.name = f"output/{number}"
    for value, spec in zip(model.graph.outputs, signature.outputs, strict=True):
        value.name = spec.name


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


def _share_weights(models: Mapping[str, Any], out: Path, unfinished: Unfinished) -> tuple[Path, str]:
    """Write every large initializer once, and make it an external tensor; returns the file and its SHA-256.

    They go to the file one by one, so that no second copy of the model is in memory. Integers stay in the ONNX file: ONNX
    Runtime reads sizes while it loads a graph, before it knows where external tensors lie.
    """
    import onnx_ir

    from cachec.engines.onnx_weights import contents, identity

    initializers = [
        (model, key, value.const_value) for model in models.values() for key, value in model.graph.initializers.items()
    ]
    wanted = [(model, key, tensor, identity(tensor)) for model, key, tensor in initializers if is_shared(tensor)]
    once = {what: tensor for _, _, tensor, what in wanted}
    with WeightsFile(unfinished) as file:
        file.expect(tensor.nbytes for tensor in once.values())
        places = {what: file.place(what, contents(tensor)) for what, tensor in once.items()}
        named = file.finish(out)
    for model, key, tensor, what in wanted:
        model.graph.initializers[key].const_value = onnx_ir.ExternalTensor(
            named.name, *places[what], tensor.dtype, shape=tensor.shape, name=key, base_dir=str(out)
        )
    return named, file.digest


def is_shared(tensor: Any) -> bool:
    """Does an initializer go to the weights file?"""
    return tensor.nbytes >= SHARED_FROM and not tensor.dtype.is_integer()
