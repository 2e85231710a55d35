"""From a rewritten graph to a program of ``torch.export``, without tracing the graph again.

``torch.export`` traces a module several times over, which takes ten times as long as all passes. The graphs are in its
operators already: what they lack is its form (weights as inputs, names, a signature), which is taken from the export of a
module that does nothing, and the values, with symbolic sizes, of nodes that passes made anew.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from cachec.passes.base import NO_WORD, fetch, outputs, placeholders, shape_of
from cachec.runtime.abi import BATCH, GROUPS, MAX_BATCH
from cachec.runtime.errors import PassError

MAX_SIZE = 1024  # of the symbolic axes beside the batch: slots, steps

Axes = tuple[str | None, ...]  # names of symbolic axes


def export_program(
    module: fx.GraphModule,
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Axes],
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> ExportedProgram:
    """The program of a rewritten graph, for an engine builder; it shares the graph's weights.

    ``inputs`` are examples by name, in the order of the program's; ``dynamic`` names the symbolic axes of each, from the
    first to the last such one, ``None`` between them. ``ranges``: the least and the most of axes that are no usual ones.

    Raises:
        PassError: the graph does not take these inputs, or fixes a symbolic size; with the reason.
    """
    shell = _export_shell(tuple(outputs(module)), inputs, dynamic, ranges or {})
    given = {node.name: node.meta["val"] for node in shell.graph.nodes if node.op == "placeholder"}
    mode = next(iter(given.values())).fake_mode
    graph, signature = fx.Graph(), _Signature()
    values = _weights_first(module, graph, signature, mode)
    read = placeholders(module)
    for name in inputs:
        node = graph.placeholder(name)
        node.meta["val"] = given[name]
        values[read[name]] = node
        signature.add(node, InputKind.USER_INPUT)
    try:
        _copy_calls(module, graph, values, _Known(given, module, dynamic, mode), mode)
    except (RuntimeError, ValueError) as error:
        raise PassError(f"the graph cannot be exported: {error}") from error
    results = [values[node] for node in outputs(module).values()]
    graph.output(tuple(results))
    symbols = _symbols(graph)
    made = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(signature.specs, made),
        state_dict=signature.state,
        range_constraints={symbol: span for symbol, span in shell.range_constraints.items() if symbol in symbols},
        module_call_graph=shell.module_call_graph,
        example_inputs=((), dict(inputs)),
    )


def _export_shell(
    results: tuple[str, ...],
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Axes],
    ranges: Mapping[str, tuple[int, int]],
) -> ExportedProgram:
    """A program of these inputs and results that does nothing."""
    names = {name for axes in dynamic.values() for name in axes if name is not None and name != GROUPS}
    usual = {name: (1, MAX_BATCH if name == BATCH else MAX_SIZE) for name in names}
    dims = {name: Dim(name, min=least, max=most) for name, (least, most) in {**usual, **ranges}.items() if name in names}
    shapes = {name: {axis: dims[d] for axis, d in enumerate(dynamic[name]) if d is not None and d in dims} for name in inputs}
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in inputs]
    graph.output({name: graph.call_function(torch.add, (given[0], number)) for number, name in enumerate(results)})
    try:
        with torch.no_grad():
            shell = fx.GraphModule(nn.Module(), graph)
            return torch.export.export(shell, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, UserError) as error:
        raise PassError(f"torch.export cannot take these inputs: {error}") from error


def _symbols(graph: fx.Graph) -> set[Any]:
    """Of its inputs' sizes. One that tracing found to be another plus a number is none."""
    shapes = [node.meta["val"].shape for node in graph.nodes if node.op == "placeholder"]
    return {
        symbol for shape in shapes for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols
    }


class _Known:
    """Values that nodes have from the capture, with the symbols of this program in place of those of the capture.

    Sizes and types are right; strides may be those from before a value was hoisted. Used only where all inputs were captured
    together and the batch is the only symbolic axis.
    """

    def __init__(
        self,
        inputs: Mapping[str, torch.Tensor],
        module: fx.GraphModule,
        dynamic: Mapping[str, Axes],
        mode: FakeTensorMode,
    ) -> None:
        self._mode = mode
        self._symbols: dict[Any, Any] = {}
        self._sizes: dict[Any, Any] = {}
        old: dict[str, Any] = {name: node.meta.get("val") for name, node in placeholders(module).items()}
        same = {value.fake_mode if isinstance(value, FakeTensor) else None for value in old.values()}
        self._some = len(same) == 1 and None not in same and all(axes == (BATCH,) for axes in dynamic.values())
        if self._some:
            pairs: Any = [pair for name, value in inputs.items() for pair in zip(old[name].shape, value.shape, strict=True)]
            self._symbols = {was.node.expr: now.node.expr for was, now in pairs if isinstance(was, torch.SymInt)}

    def of(self, node: fx.Node) -> Any:
        """The node's value, or ``None``."""
        return pytree.tree_map(self._renamed, node.meta["val"]) if self._some and "val" in node.meta else None

    def _renamed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return self._size(value)
        with self._mode:
            size, stride = ([self._size(one) for one in sizes] for sizes in (value.shape, value.stride()))
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        was = size.node.expr
        if was not in self._sizes:
            env: Any = self._mode.shape_env
            now = was.xreplace(self._symbols)
            self._sizes[was] = env.create_symintnode(now, hint=size.node.hint)
        return self._sizes[was]


class _Signature:
    """The inputs of a program as they are added, and the weights among them."""

    def __init__(self) -> None:
        self.specs: list[InputSpec] = []
        self.state: dict[str, torch.Tensor] = {}

    def add(self, node: fx.Node, kind: InputKind, target: str | None = None) -> None:
        persistent = True if kind == InputKind.BUFFER else None
        self.specs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))


def _weights_first(
    module: fx.GraphModule, graph: fx.Graph, signature: _Signature, mode: FakeTensorMode
) -> dict[fx.Node, fx.Node]:
    """Inputs for the parameters, then for the buffers, as a program has them; by the node that read them."""
    values: dict[fx.Node, fx.Node] = {}
    read = [node for node in module.graph.nodes if node.op == "get_attr"]
    held = {str(node.target): fetch(module, str(node.target)) for node in read}
    made: dict[str, fx.Node] = {}
    for kind, prefix in ((InputKind.PARAMETER, "p_"), (InputKind.BUFFER, "b_")):
        for name, value in held.items():
            if isinstance(value, nn.Parameter) == (kind == InputKind.PARAMETER):
                made[name] = graph.placeholder(prefix + NO_WORD.sub("_", name))
                made[name].meta["val"] = _fake(value, mode)
                signature.add(made[name], kind, name)
                signature.state[name] = value
    values.update({node: made[str(node.target)] for node in read})
    return values


def _fake(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A weight as a value of ``mode``; it may be one of another mode already."""
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _copy_calls(
    module: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, fx.Node], known: _Known, mode: FakeTensorMode
) -> None:
    """Copy the calls, with the values that they give for this program's sizes."""

    def value_of(node: fx.Node) -> Any:
        return node.meta["val"]

    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            values[node] = new = graph.node_copy(node, values.__getitem__)
            new.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
            new.meta["val"] = known.of(node)
            if new.meta["val"] is None:
                args, kwargs = fx.node.map_arg((new.args, new.kwargs), value_of)
                new.meta["val"] = shape_of(node.target, *args, **kwargs)
