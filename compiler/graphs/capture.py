"""Capture: from a PyTorch module to a graph module that the passes can read.

``B`` batch (symbolic), everything else static: one resolution and one text length per bundle.
"""

import linecache
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cachec.compiler.graphs.finite import place_of
from cachec.compiler.graphs.in_place import UnknownWriteError, is_functional, replace_writes
from cachec.compiler.graphs.weights import Values, has_values, is_large, is_named
from cachec.passes import Graphs, Stage
from cachec.passes.base import copy_module
from cachec.runtime.abi import BATCH, FEATURE, HISTORY_STEPS, MAX_BATCH, MODEL, SIGMAS, STEP, VELOCITY, history_name
from cachec.runtime.errors import PassError, in_one_line
from cachec.runtime.model_io import ModelIO

log = logging.getLogger(__name__)

KEEPS_LENGTHS = torch.torch_version.TorchVersion(torch.__version__) >= "2.12"  # what operators are told of a batch
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # through a whole model, relative


aten = torch.ops.aten
COMMON = {  # operators of encoders and decoders, and others that are the same
    aten.view.default: aten.reshape.default,  # kernels lay out what they give as they like: views may not fit
    aten.__and__.Tensor: aten.bitwise_and.Tensor,  # what ONNX has a function for
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}


class _Captured(nn.Module):
    """Calls ``model`` by keyword, with ``constants`` filled in, and names its output, and ``more`` that it gives behind.

    Floating inputs and the velocity are float32 whatever the model's own precision; labels and masks keep their types.
    """

    def __init__(self, model: nn.Module, constants: Mapping[str, Any], more: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self._more = model, more
        self._flags = {name: value for name, value in constants.items() if not isinstance(value, torch.Tensor)}
        self._tables = [name for name in constants if name not in self._flags]
        for name in self._tables:
            self.register_buffer(f"table_{name}", constants[name])

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tables = {name: getattr(self, f"table_{name}") for name in self._tables}
        dtype = next(self.model.parameters()).dtype
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        output = self.model(**given, **tables, **self._flags)
        first, *more = output if isinstance(output, tuple) else (output,)
        return {VELOCITY: first.float(), **dict(zip(self._more, more, strict=False))}


def capture_model(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any] | None = None,
    more: tuple[str, ...] = (),
) -> Graphs:
    """Capture ``model(**inputs, **constants)`` with a symbolic batch; the graph returns ``{"velocity": …}``, and ``more``.

    ``inputs`` are examples, batch first with at least two samples, pairwise distinct objects (``torch.export`` merges
    equal ones). ``constants`` are baked in: flags, and tensors that depend on the resolution only. The graph shares the
    model's parameters. Of a large model whose weights are named, nothing is compared (see ``verify_twin``), nor of one without
    weights.

    Raises:
        PassError: the model cannot be captured, or the graph does not compute exactly what the model does; on a GPU, up to
            rounding.
    """
    if len({id(t) for t in inputs.values()}) != len(inputs) or any(t.shape[0] < 2 for t in inputs.values()):
        raise PassError("example inputs must be distinct tensors with a batch of at least two")
    wrapped = _Captured(model, constants or {}, more).eval()
    module = _trace(wrapped, inputs, batched=inputs, outputs=(VELOCITY, *more))
    _strip_module_prefix(module, "model")
    if not any(map(is_named, model.parameters())) or (has_values(model) and not is_large(model)):
        _compare(wrapped, module, inputs)
    return Graphs({MODEL: module}, stage=Stage.CAPTURED)


def _compare(model: nn.Module, module: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> None:
    values = Values(next(iter(inputs.values())).device)
    held = {name: values.of(parameter) for name, parameter in model.named_parameters() if is_named(parameter)}
    with torch.no_grad():
        wanted = torch.func.functional_call(model, held, (dict(inputs),))[VELOCITY]
        got = values.module(module)(**inputs)[VELOCITY]
    if not torch.equal(wanted.nan_to_num(), got.nan_to_num()):  # what is not finite is for others to refuse
        error = ((wanted - got).norm() / wanted.norm()).item()
        allowed = ROUNDING[next(model.parameters()).dtype]
        if wanted.is_cpu or not error <= allowed:  # GPUs may sum in another order from call to call
            raise PassError(f"the captured graph differs from the model, relatively by {error:.1e}")


def joined(inputs: Mapping[str, torch.Tensor], io: ModelIO) -> dict[str, torch.Tensor]:
    """The inputs as the model takes them: the state with its parts behind it."""
    whole = torch.cat([inputs[name] for name in (io.latents, *io.parts)], io.axis) if io.parts else inputs[io.latents]
    return {name: whole if name == io.latents else value for name, value in inputs.items() if name not in io.parts}


def named_model(model: nn.Module, constants: Mapping[str, Any]) -> nn.Module:
    """The eager module that :func:`capture_model` captures: from a dictionary of inputs to a dictionary."""
    return _Captured(model, constants).eval()


def capture_component(module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...]) -> fx.GraphModule:
    """Capture a part of a pipeline, from a dictionary to a dictionary with ``outputs`` in this order; all sizes are fixed.

    Raises:
        PassError: it cannot be captured.
    """
    captured = _trace(module, inputs, batched=(), outputs=outputs, again=True)
    for node in captured.graph.nodes:
        node.target = COMMON.get(node.target, node.target)
    captured.recompile()
    return captured


def capture_predictor(predictor: nn.Module, window: int, example: torch.Tensor, num_steps: int) -> fx.GraphModule:
    """Capture ``predictor(features, history_steps, sigmas, step)``.

    ``features`` is a list of ``window`` tensors like ``example`` [B, L, D], newest first; ``history_steps`` [window] and
    ``step`` are int64, ``sigmas`` [num_steps + 1] float32.
    """
    names = [history_name(i) for i in range(window)]
    inputs = {
        **{name: example + i for i, name in enumerate(names)},
        HISTORY_STEPS: torch.arange(window, 0, -1) + 2,
        SIGMAS: torch.linspace(1, 0, num_steps + 1),
        STEP: torch.tensor(window + 5),
    }
    inputs = {name: value.to(example.device) for name, value in inputs.items()}
    return _trace(_NamedPredictor(predictor, names).eval(), inputs, batched=names, outputs=(FEATURE,))


def capture_map(module: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Capture a module from a feature like ``example`` [B, …] to one of another kind, with a symbolic batch."""
    return _trace(_NamedMap(module).eval(), {FEATURE: example}, batched=[FEATURE], outputs=(FEATURE,))


class _NamedMap(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {FEATURE: self.module(inputs[FEATURE])}


class _NamedPredictor(nn.Module):
    def __init__(self, predictor: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.predictor = predictor
        self._names = names

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = [inputs[name] for name in self._names]
        feature = self.predictor(features, inputs[HISTORY_STEPS], inputs[SIGMAS], inputs[STEP])
        return {FEATURE: feature}


def _trace(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    batched: Iterable[str],
    outputs: tuple[str, ...],
    again: bool = False,
) -> fx.GraphModule:
    """Capture a module from a dictionary to a dictionary; the graph takes the same names as keywords.

    ``again``: what writes in place is traced once more. That leaves few kinds of operators, as passes do for models only.
    """
    batched = set(batched)
    batch = Dim(BATCH, min=1, max=MAX_BATCH)
    shapes = {name: {0: batch} if name in batched else {} for name in inputs}
    graph_module = _export(module, dict(inputs), shapes, again=again)
    graph = graph_module.graph
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(nodes, inputs, strict=True):
        node.target = name
        node._rename(name)
    result = next(iter(reversed(graph.nodes)))
    result.args = (dict(zip(outputs, result.args[0], strict=True)),)
    graph.set_codegen(fx.graph.CodeGen())
    return copy_module(graph_module)  # a fresh module: the exported one has hooks that check the dictionary


def _export(module: nn.Module, inputs: dict[str, torch.Tensor], shapes: Any, *, again: bool) -> fx.GraphModule:
    what = getattr(module, "model", module)
    try:
        with torch.no_grad(), nullcontext() if KEEPS_LENGTHS else _RepeatByView():
            program = torch.export.export(module, (inputs,), dynamic_shapes=(shapes,), strict=False)
            graph_module = _functional(program, again=again)
    except (RuntimeError, ValueError, UserError) as error:
        reason = in_one_line(error)
        raise PassError(f"torch.export cannot capture {type(what).__name__}{_place_in(what, error)}: {reason}") from error
    for node in graph_module.graph.nodes:
        if any(map(free_unbacked_symbols, pytree.tree_leaves(node.meta.get("val")))):
            wrong = f"sizes or numbers in it depend on values of tensors, first at {place_of(node)}"
            raise PassError(f"{type(what).__name__} cannot be captured: {wrong}")
    return graph_module


class _RepeatByView(TorchFunctionMode):
    """Repeats along an axis by views: PyTorch 2.11 takes the length that ``repeat_interleave`` is told for a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.Tensor.repeat_interleave and isinstance(args[1], int) and given.get("dim") is not None:
            tensor, times, axis = args[0], args[1], given["dim"] % args[0].ndim
            shape = [*tensor.shape[: axis + 1], times, *tensor.shape[axis + 1 :]]
            return tensor.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)
        return func(*args, **given)


def _functional(program: ExportedProgram, *, again: bool) -> fx.GraphModule:
    """The graph of a program, its weights in it, without writes in place."""
    graph_module: fx.GraphModule = program.module(check_guards=False)
    if all(map(is_functional, graph_module.graph.nodes)):
        return graph_module
    if not again:
        try:
            replace_writes(graph_module)
        except UnknownWriteError as reason:  # costs as much as the export did
            log.info("traced once more, since %s", reason)
        else:
            return graph_module
    graph_module = program.run_decompositions({}).module(check_guards=False)
    return graph_module


def _place_in(model: nn.Module, error: BaseException) -> str:
    """Which module of ``model``, and which line, an error of tracing comes from; nothing if it is from elsewhere."""
    paths = {id(part): path for path, part in model.named_modules()}
    seen: BaseException | None = error
    while seen is not None:
        frames = [(frame, line) for frame, line in walk_tb(seen.__traceback__) if id(frame.f_locals.get("self")) in paths]
        if frames:
            frame, line = frames[-1]
            path, file = paths[id(frame.f_locals["self"])], frame.f_code.co_filename
            return f" at {path or 'its forward'}, {Path(file).name}:{line} ({linecache.getline(file, line).strip()})"
        seen = seen.__cause__ or seen.__context__
    return ""


def _strip_module_prefix(module: fx.GraphModule, prefix: str) -> None:
    """Make module paths in the nodes' metadata those of the model itself, without the wrapper's ``prefix``."""
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths = {key: path.removeprefix(prefix).removeprefix(".") for key, (path, _) in stack.items()}
            node.meta["nn_module_stack"] = {key: (paths[key], kind) for key, (_, kind) in stack.items()}
