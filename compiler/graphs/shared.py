"""One set of engines for all sizes of a bundle, from the graphs that were made for each size on its own.

The graphs of two sizes are the same, node by node, but for whole numbers (of tokens, say) and for tables (of positions). What
differs becomes an input: a number is read off an axis of an input, and a table is given with each size. So at every size the
one graph is, by how it is made, the graph of that size alone, whatever the model builds its tables from; the passes know
nothing of it.
"""

import hashlib
import logging
import operator
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from cachec.compiler.graphs.export import EnginePlan
from cachec.compiler.graphs.exported import export_program
from cachec.compiler.graphs.weights import Values, expression, is_named
from cachec.passes.base import fetch, outputs, placeholders, tensors
from cachec.runtime.errors import PassError
from cachec.runtime.specs import Dim, Signature, TensorSpec

log = logging.getLogger(__name__)

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class SharedPlans:
    """Engines for several sizes. By size, in order: how long each of the named ``axes`` is, and the ``tables``, by input."""

    plans: list[EnginePlan]
    axes: tuple[Mapping[str, int], ...]
    tables: tuple[Mapping[str, torch.Tensor], ...]


def share_plans(sizes: Sequence[Sequence[EnginePlan]], *, compare: bool) -> SharedPlans:
    """One set of engines from those of each size. ``compare``: run them at all sizes, beside those of each size.

    Raises:
        PassError: a graph is another one at another size; says where they differ.
    """
    if len({tuple(plan.name for plan in plans) for plans in sizes}) != 1:
        raise PassError("there are other graphs at another size")
    known = _Known(len(sizes))
    merged = [_Merged(same, known) for same in zip(*sizes, strict=True)]
    shared = [one.plan() for one in merged]
    axes = tuple({name: values[place] for values, name in known.axes.items()} for place in range(len(sizes)))
    tables = tuple(map(known.tables_at, range(len(sizes))))
    for place in range(len(sizes)):
        for one, plan in zip(merged, shared, strict=True):
            one.check_shapes(plan, place)
            if compare:
                one.check_values(plan, place)
    return SharedPlans(shared, axes, tables)


class _Known:
    """What differs by size, and its names: the same numbers are one axis, the same tables one input, in all graphs."""

    def __init__(self, count: int) -> None:
        self.axes: dict[tuple[int, ...], str] = {}
        self.tables: dict[str, tuple[torch.Tensor, ...]] = {}
        self._tables: dict[Hashable, str] = {}
        self._rulers: dict[tuple[int, ...], str] = {}
        self._contents: dict[int, tuple[torch.Tensor, Hashable]] = {}  # by what they are of, which is held
        self._count = count

    def axis(self, values: tuple[int, ...]) -> str:
        return self.axes.setdefault(values, f"size_{len(self.axes) + 1}")

    def dims(self, several: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
        """A shape of all sizes."""
        if len({len(dims) for dims in several}) != 1:
            raise PassError(f"a tensor has shapes {' and '.join(str(list(dims)) for dims in several)}")
        return tuple(self._dim(values) for values in zip(*several, strict=True))

    def _dim(self, values: tuple[Dim, ...]) -> Dim:
        if len(set(values)) == 1:
            return values[0]
        return self.axis(tuple(int(value) for value in values))

    def tables_at(self, place: int) -> dict[str, torch.Tensor]:
        """The tables of one size, by input."""
        return {name: several[place] for name, several in self.tables.items()}

    def table(self, several: tuple[torch.Tensor, ...]) -> str:
        """The input that has these values, by size."""
        key = tuple(map(self._content, several))
        if key not in self._tables:
            self._tables[key] = f"table_{len(self._tables) + 1}"
            self.tables[self._tables[key]] = several
        return self._tables[key]

    def _content(self, tensor: torch.Tensor) -> Hashable:
        if id(tensor) not in self._contents:  # a table may be read by every block
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(raw.data).hexdigest()
            self._contents[id(tensor)] = tensor, (tensor.dtype, tuple(tensor.shape), digest)
        return self._contents[id(tensor)][1]

    def ruler(self, values: tuple[int, ...]) -> str:
        """An input of which only the length matters, for a number that no other input of a graph has."""
        if values not in self._rulers:
            self._rulers[values] = f"ruler_{len(self._rulers) + 1}"
            self.tables[self._rulers[values]] = tuple(torch.zeros(value) for value in values)
        return self._rulers[values]


class _Merged:
    """One graph that is made from those of each size, which are alike."""

    def __init__(self, same: Sequence[EnginePlan], known: _Known) -> None:
        self._same, self._known = same, known
        self._graph, self._attributes = fx.Graph(), dict[str, Any]()
        self._places: list[dict[fx.Node, fx.Node]] = [{} for _ in same]  # by size: from its nodes to those here
        self._lengths: dict[tuple[int, ...], tuple[fx.Node, int]] = {}  # inputs' axes that tell a number
        self._numbers: dict[tuple[int, ...], fx.Node] = {}
        self._added: dict[str, fx.Node] = {}  # inputs
        if len({(len(plan.signature.inputs), len(plan.signature.outputs)) for plan in same}) != 1:
            raise PassError(f"{same[0].name} has other inputs or outputs at another size")
        self._inputs = [self._spec([plan.signature.inputs[i] for plan in same]) for i in range(len(same[0].signature.inputs))]
        self._outputs = [
            self._spec([plan.signature.outputs[i] for plan in same]) for i in range(len(same[0].signature.outputs))
        ]
        self._varies = any(one.shape != other.shape for one, other in zip(self._inputs, same[0].signature.inputs, strict=True))
        self._copy()

    def _spec(self, specs: Sequence[TensorSpec]) -> TensorSpec:
        if len({(spec.name, spec.dtype) for spec in specs}) != 1:
            raise PassError(f"{self._same[0].name} has another input or output at another size, {specs[0].name}")
        return TensorSpec(specs[0].name, self._known.dims([spec.shape for spec in specs]), specs[0].dtype)

    def _copy(self) -> None:
        several = [list(plan.graph.graph.nodes) for plan in self._same]
        for nodes in zip(*several, strict=False):
            if len({node.op for node in nodes}) != 1:
                raise self._differs(nodes, "it is something else")
            if nodes[0].op == "placeholder":
                self._take(nodes)
        for nodes in zip(*several, strict=False):
            if nodes[0].op == "get_attr":
                self._keep(nodes, self._held(nodes))
            elif nodes[0].op == "call_function" and (new := self._call(nodes)) is not None:
                self._keep(nodes, new)
        if len({len(nodes) for nodes in several}) != 1:
            raise PassError(f"{self._same[0].name} has {' and '.join(str(len(nodes)) for nodes in several)} nodes")
        results = {name: self._places[0][node] for name, node in outputs(self._same[0].graph).items()}
        self._graph.output(results)

    def _take(self, nodes: Sequence[fx.Node]) -> None:
        name = str(nodes[0].target)
        if {str(node.target) for node in nodes} != {name}:
            raise self._differs(nodes, "it is something else")
        new = self._graph.placeholder(name)
        for axis, dim in enumerate(next(spec for spec in self._inputs if spec.name == name).shape):
            self._measure(new, axis, dim)
        self._keep(nodes, new)

    def _measure(self, node: fx.Node, axis: int, dim: Dim) -> None:
        values = next((values for values, name in self._known.axes.items() if name == dim), None)
        if values is not None:
            self._lengths.setdefault(values, (node, axis))

    def _keep(self, nodes: Sequence[fx.Node], new: fx.Node) -> None:
        new.meta = dict(nodes[0].meta)
        for place, node in zip(self._places, nodes, strict=True):
            place[node] = new

    def _held(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """A weight, or a table that becomes an input if it differs."""
        values = tuple(fetch(plan.graph, str(node.target)) for plan, node in zip(self._same, nodes, strict=True))
        if all(_is_same(value, values[0]) for value in values):
            self._attributes[str(nodes[0].target)] = values[0]
            return self._graph.get_attr(str(nodes[0].target))
        if any(isinstance(value, nn.Parameter) or is_named(value) for value in values):
            raise self._differs(nodes, "it is a weight with other values")
        if len({(value.ndim, value.dtype) for value in values}) != 1:
            raise self._differs(nodes, "it is a table of another kind")
        return self._input(self._known.table(values), self._known.dims([tuple(map(int, value.shape)) for value in values]))

    def _input(self, name: str, dims: tuple[Dim, ...]) -> fx.Node:
        """A further input; one that is there already, if it is."""
        if name in self._added:
            return self._added[name]
        with self._graph.inserting_before(next(iter(self._graph.nodes), None)):
            node = self._added[name] = self._graph.placeholder(name)
        for axis, dim in enumerate(dims):
            self._measure(node, axis, dim)
        dtype = str(self._known.tables[name][0].dtype).removeprefix("torch.")
        self._inputs.append(TensorSpec(name, dims, dtype))
        self._varies = True
        return node

    def _call(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """The call of all sizes; ``None`` of one whose readers do without."""
        if len({node.target for node in nodes}) != 1:
            raise self._differs(nodes, f"it is {' and '.join(str(node.target) for node in nodes)}")
        if nodes[0].target is aten.split_with_sizes.default and len({str(node.args[1]) for node in nodes}) != 1:
            return None
        if nodes[0].target is operator.getitem and nodes[0].args[0] not in self._places[0]:
            return self._part(nodes)
        args, kwargs = (self._argument(nodes, [getattr(node, side) for node in nodes]) for side in ("args", "kwargs"))
        return self._graph.call_function(nodes[0].target, args, kwargs)  # type: ignore[arg-type]

    def _part(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """A part of a split, as a slice: of a split into sizes that are not known, ONNX makes a sequence."""
        number: int = nodes[0].args[1]  # type: ignore[assignment]
        splits: list[Any] = [node.args[0] for node in nodes]
        if len({(node.args[1], len(split.args[1])) for node, split in zip(nodes, splits, strict=True)}) != 1:
            raise self._differs(nodes, "it is another part")
        given = self._argument(nodes, [split.args[0] for split in splits])
        axis = self._argument(nodes, [split.args[2] if len(split.args) > 2 else 0 for split in splits])
        begin, end = ([sum(split.args[1][:count]) for split in splits] for count in (number, number + 1))
        last = number + 1 == len(splits[0].args[1])
        until = sys.maxsize if last else self._argument(nodes, end)
        return self._graph.call_function(aten.slice.Tensor, (given, axis, self._argument(nodes, begin), until))

    def _argument(self, nodes: Sequence[fx.Node], given: Sequence[Any]) -> Any:
        first = given[0]
        if isinstance(first, fx.Node):
            new = [place.get(value) for place, value in zip(self._places, given, strict=True)]
            if new[0] is None or any(one is not new[0] for one in new):
                raise self._differs(nodes, "it reads something else")
            return new[0]
        if isinstance(first, list | tuple):
            if len({len(value) for value in given}) != 1:
                raise self._differs(nodes, f"it takes {' and '.join(map(str, given))}")
            return type(first)(self._argument(nodes, values) for values in zip(*given, strict=True))
        if isinstance(first, Mapping):
            return {name: self._argument(nodes, [value[name] for value in given]) for name in first}
        if all(type(value) is type(first) and value == first for value in given):
            return first
        if all(type(value) is int for value in given):
            return self._number(tuple(given))
        raise self._differs(nodes, f"it takes {' and '.join(map(str, given))}")

    def _number(self, values: tuple[int, ...]) -> fx.Node:
        """A number that differs, read off an input."""
        if values not in self._numbers:
            if values not in self._lengths:
                if min(values) < 0:
                    raise PassError(
                        f"{self._same[0].name} has a number that is {' and '.join(map(str, values))} by size, and no axis is"
                    )
                self._input(self._known.ruler(values), (self._known.axis(values),))
            node, axis = self._lengths[values]
            self._numbers[values] = self._graph.call_function(aten.sym_size.int, (node, axis))
        return self._numbers[values]

    def plan(self) -> EnginePlan:
        """The engine to build; examples are those of the first size."""
        if not self._varies:
            return self._same[0]
        module = fx.GraphModule(self._attributes, self._graph)
        module.graph.lint()
        inputs, axes = self._examples(0), self._known.axes
        dynamic = {spec.name: tuple(dim if isinstance(dim, str) else None for dim in spec.shape) for spec in self._inputs}
        ranges = {name: (min(values), max(values)) for values, name in axes.items()}
        program = export_program(module, inputs, dynamic, ranges)
        return EnginePlan(self._same[0].name, program, Signature(tuple(self._inputs), tuple(self._outputs)), module)

    def _examples(self, place: int) -> dict[str, torch.Tensor]:
        _, own = self._same[place].program.example_inputs
        known = {**own, **self._known.tables_at(place)}
        return {spec.name: known[spec.name] for spec in self._inputs}

    def check_shapes(self, plan: EnginePlan, place: int) -> None:
        """Raise ``PassError`` unless all values have the shapes of the graph of that size: tracing may fix a size."""
        examples, symbols = self._examples(place), dict[Any, int]()
        given = {node.name: node for node in plan.program.graph.nodes if node.op == "placeholder"}
        for spec in self._inputs if plan.graph is not self._same[0].graph else ():
            value = given[spec.name].meta["val"]
            for size, length in zip(value.shape, examples[spec.name].shape, strict=True):
                if isinstance(size, torch.SymInt):
                    symbols[size.node._expr] = int(length)
        if not symbols:
            return
        traced, wanted_of = _traced(plan), _traced(self._same[place])
        for old, new in self._places[place].items():
            node, wanted = traced.get(new), wanted_of.get(old)
            for value, other in zip(*(tensors(one) if one is not None else () for one in (node, wanted)), strict=True):
                found = [_at(size, symbols) for size in value.shape]
                if found != [_at(size, {}) for size in other.shape]:
                    raise self._differs([old], f"it is {found}, and should be {list(other.shape)}, at another size")

    def check_values(self, plan: EnginePlan, place: int) -> None:
        """Raise ``PassError`` unless the graph gives exactly what that of the size gives."""
        own, inputs = self._same[place], self._examples(place)
        values = Values(next(iter(inputs.values())).device)
        with torch.no_grad():
            found = values.module(plan.graph)(**inputs)
            wanted = values.module(own.graph)(**{name: inputs[name] for name in placeholders(own.graph)})
        for name, value in wanted.items():
            if not torch.equal(found[name].nan_to_num(), value.nan_to_num()):
                raise PassError(f"{plan.name} gives another {name} than the graph of that size alone")

    def _differs(self, nodes: Sequence[fx.Node], how: str) -> PassError:
        return PassError(f"{self._same[0].name} is another graph at another size: at {nodes[0]} {how}")


def _traced(plan: EnginePlan) -> dict[fx.Node, fx.Node]:
    """The calls of a program, by those of the graph that it was made from."""
    calls, traced = (
        [node for node in one.nodes if node.op == "call_function"] for one in (plan.graph.graph, plan.program.graph)
    )
    return dict(zip(calls, traced, strict=True))


def _at(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size where symbols have these values; the others have those of the example."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not symbols:
        return int(size.node.hint)
    length = size.node.expr.xreplace(symbols)
    return -1 if getattr(length, "free_symbols", None) else int(length)  # less than any, where no input tells it


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if is_named(a) or is_named(b):
        return is_named(a) and is_named(b) and expression(a).key == expression(b).key
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
