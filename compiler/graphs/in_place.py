"""Writes in place, made functional on a captured graph.

``x[..., 0] = y`` writes through a view, ``copy_(select(x), y)``: it becomes ``select_scatter(x, y)``, and what reads ``x`` or a
view of it later reads the new value. Tracing everything anew (``run_decompositions``) does the same, and takes longer than the
first export. Which tensors lie in one memory is seen in the values that the export left in ``meta["val"]``.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.types import py_sym_types

from cachec.compiler.graphs.finite import place_of
from cachec.passes.base import CAST, emit, sizes_by_name, tensors

aten = torch.ops.aten

RESHAPES = {  # views whose elements lie in the order of those they are views of
    *(aten.view.default, aten.view_as.default, aten._unsafe_view.default, aten.reshape.default, aten.reshape_as.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
}
PARTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes}  # along an axis, all of it
NAMED = {aten.zero_.default: aten.zeros_like.default, aten.detach_.default: aten.detach.default}  # otherwise than by schema
GIVEN = {aten.copy_.default: 1, aten.detach_.default: 0}  # which argument is the new value already


class UnknownWriteError(Exception):
    """A write that only tracing anew makes functional; says which, and why."""


def is_functional(node: fx.Node) -> bool:
    """A plain call that writes into nothing, or arithmetic of sizes?"""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return isinstance(node.meta.get("val"), py_sym_types)


def replace_writes(module: fx.GraphModule) -> None:
    """Make every write in ``module`` functional: it computes what it did, bit by bit. Its code is not made anew.

    Raises:
        UnknownWriteError: one writes into an input or a weight, through a view that is not known, or is not an operator's; the
            module is half rewritten then.
    """
    writes = {node: _functional(node) for node in module.graph.nodes if not is_functional(node)}
    memories = _memories(module.graph.nodes, writes)
    _Rewriting(writes, memories).run(module.graph)
    for node in reversed(module.graph.nodes):
        if node in writes or (node in memories and not node.users):
            module.graph.erase_node(node)


def _functional(node: fx.Node) -> OpOverload:
    """The operator that gives what ``node`` leaves in its first argument."""
    target = node.target
    if target in NAMED:
        return NAMED[target]
    if not isinstance(target, OpOverload):
        raise UnknownWriteError(f"{place_of(node)} is not an operator")
    name, schema = target._schema.name.removeprefix("aten::"), target._schema
    plain = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")  # mask &= other is __iand__
    same = getattr(getattr(aten, plain, None), target._overloadname, None)
    strange = {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded} & {*target.tags}
    if plain == name or not isinstance(same, OpOverload) or strange or not target.namespace == "aten":
        raise UnknownWriteError(f"{place_of(node)} has no functional form")
    takes = [[(argument.name, str(argument.type)) for argument in op._schema.arguments] for op in (target, same)]
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    if takes[0] != takes[1] or written.index(True) or sum(written) > 1 or not isinstance(node.args[0], fx.Node):
        raise UnknownWriteError(f"{place_of(node)} has no functional form")
    return same


class _Memory:
    """One piece of memory that is written into. ``root`` made it, other nodes hold tensors that lie in it, too.

    ``now`` are the nodes that give what a node of this memory holds, of those for which there is one since the last write.
    """

    def __init__(self) -> None:
        self.root: fx.Node | None = None
        self.now: dict[fx.Node, fx.Node] = {}


def _memories(nodes: Iterable[fx.Node], writes: Iterable[fx.Node]) -> dict[fx.Node, _Memory]:
    """The memory of each node whose value lies in one that is written into."""
    by_storage = {storage: _Memory() for node in writes for storage in _storages(node.args[0])}
    found: dict[fx.Node, _Memory] = {}
    for node in nodes:
        if node.op == "get_attr" and {user.target for user in node.users} == {aten.lift_fresh_copy.default}:
            continue  # a constant: its copy begins a memory, though the values, which are older than that operator, share one
        lies_in = {by_storage[storage] for storage in _storages(node) if storage in by_storage}
        reads = {found[one] for one in node.all_input_nodes if one in found}
        if not _is_as_declared(node, lies_in & reads, found):
            raise UnknownWriteError(f"the values do not say of {place_of(node)} what its schema does: is it a view?")
        if isinstance(node.meta.get("val"), list | tuple) and not lies_in & reads:
            continue  # it gives several tensors of its own: each begins where it is taken out
        if len(lies_in) > 1:
            raise UnknownWriteError(f"{place_of(node)} gives tensors of several memories that are written into")
        for memory in lies_in:
            if memory.root is None and node.op != "call_function":
                raise UnknownWriteError(f"{node.op} {node.target} is written into")
            if memory.root is not None and memory not in reads:
                raise UnknownWriteError(f"{place_of(node)} lies in memory of {memory.root.name}, which it does not read")
            memory.root = memory.root or node
            found[node] = memory
    return found


def _is_as_declared(node: fx.Node, shares: set[_Memory], memories: dict[fx.Node, _Memory]) -> bool:
    """Is it a view of what its schema says, and of nothing else? Operators made of others are free to copy, and to hand on."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable or target._can_decompose():
        return True
    of = memories.get(node.args[0]) if target.is_view and node.args and isinstance(node.args[0], fx.Node) else None
    return shares == ({of} if of else set())


class _Rewriting:
    """One walk over a graph, in order; behind it every node is a value that does not change.

    ``writes``: the functional operators of nodes that write. ``memories``: of the nodes whose values lie in one.
    """

    def __init__(self, writes: dict[fx.Node, OpOverload], memories: dict[fx.Node, _Memory]) -> None:
        self._writes, self._memories = writes, memories
        self._given: dict[fx.Node, Any] = {node: (node.args, node.kwargs) for node in memories}  # before the walk's edits
        self._inputs = {node: node.all_input_nodes for node in memories}

    def run(self, graph: fx.Graph) -> None:
        for node in [*graph.nodes]:
            with graph.inserting_before(node):
                if node in self._writes:
                    self._write(node)
                    continue
                node.args, node.kwargs = self._all_now((node.args, node.kwargs), node)
            if node in self._memories:
                self._memories[node].now[node] = node

    def _now(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """What gives the value that ``node`` holds when ``reader`` runs; made in front of it if nothing does."""
        memory = self._memories.get(node)
        if memory is None:
            return node
        if node not in memory.now:
            same = self._same(node)
            if same is not None:
                memory.now[node] = self._now(same, reader)
            else:
                args, kwargs = self._all_now(self._given[node], reader)
                memory.now[node] = emit(reader, node.target, *args, **kwargs)
        return memory.now[node]

    def _all_now(self, arguments: Any, reader: fx.Node) -> Any:
        return fx.node.map_arg(arguments, lambda one: self._now(one, reader))

    def _same(self, node: fx.Node) -> fx.Node | None:
        """The argument that ``node`` holds every element of, in the same places: what it writes into, or hands on."""
        if node in self._writes:
            return self._inputs[node][0]
        memory, value = self._memories[node], node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return None
        inputs = [one for one in self._inputs[node] if self._memories.get(one) is memory]
        return next((one for one in inputs if _places(one.meta["val"]) == _places(value)), None)

    def _write(self, node: fx.Node) -> None:
        """Put the new value of all that ``node`` writes into in front of it, from the view outwards."""
        part = self._given[node][0][0]
        args, kwargs = self._all_now(self._given[node], node)
        value = args[GIVEN[node.target]] if node.target in GIVEN else emit(node, self._writes[node], *args, **kwargs)
        memory, now = self._memories[part], {}
        while True:
            held, is_all = part.meta["val"], part is memory.root
            value = self._as_held(value, part, node)
            if is_all and not _is_laid_out(value.meta["val"], held):
                value = emit(node, aten.copy.default, self._now(part, node), value)
            if _is_laid_out(value.meta["val"], held):
                now[part] = value
            if is_all:
                break
            part, value = self._written_back(part, value, node)
        if part not in now:
            raise UnknownWriteError(f"after {place_of(node)} {part.name} is laid out in another way")
        memory.now = now

    def _as_held(self, value: fx.Node, part: fx.Node, write: fx.Node) -> fx.Node:
        """``value`` with the type, the device and the sizes of ``part``; ``copy`` would do, but does not broadcast in ONNX."""
        new, held = value.meta["val"], part.meta["val"]
        if (new.dtype, new.device) != (held.dtype, held.device):
            value = emit(write, CAST, value, dtype=held.dtype, device=held.device)
        if sizes_by_name(new) != sizes_by_name(held):
            value = emit(write, aten.expand_as.default, value, self._now(part, write))
        return value

    def _written_back(self, part: fx.Node, value: fx.Node, write: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What ``part`` is a view of, and its value once ``part`` has a new one."""
        if (same := self._same(part)) is not None:
            return same, value
        args, kwargs = self._given[part]
        target: Any = part.target
        whole = args[0]
        if target is operator.getitem:
            several, index = args
            whole = self._given[several][0][0]
            return whole, self._part_written(several, index, self._now(whole, write), value, write)
        if target in SCATTERS:
            back = emit(write, SCATTERS[target], self._now(whole, write), value, *args[1:], **kwargs)
        elif target in INVERSES and not kwargs:
            back = emit(write, *INVERSES[target](value, *args[1:], **kwargs))
        elif target in RESHAPES:
            back = emit(write, aten.reshape.default, value, _sizes(whole, write))
        else:
            raise UnknownWriteError(f"{place_of(write)} writes through {target}")
        return whole, back

    def _part_written(self, several: fx.Node, index: int, whole: fx.Node, value: fx.Node, write: fx.Node) -> fx.Node:
        """``whole`` with a new ``value`` of one of the ``several`` parts that it was taken apart into."""
        args, kwargs = self._given[several]
        at = 1 if several.target == aten.unbind.int else 2
        axis: Any = args[at] if len(args) > at else kwargs.get("dim", 0)
        if several.target == aten.unbind.int:
            return emit(write, aten.select_scatter.default, whole, value, axis, index)
        sizes = [part.shape[axis] for part in several.meta["val"]]
        if several.target not in PARTS or not all(isinstance(size, int) for size in sizes):
            raise UnknownWriteError(f"{place_of(write)} writes through {several.target}")
        begin = sum(sizes[:index])
        return emit(write, aten.slice_scatter.default, whole, value, axis, begin, begin + sizes[index])


def _inverse_permute(value: fx.Node, dims: list[int]) -> tuple[Any, ...]:
    axes = [axis % len(dims) for axis in dims]
    return aten.permute.default, value, [axes.index(axis) for axis in range(len(axes))]


SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
INVERSES: dict[Any, Callable[..., tuple[Any, ...]]] = {  # an operator and its arguments
    aten.transpose.int: lambda value, one, other: (aten.transpose.int, value, one, other),
    aten.t.default: lambda value: (aten.t.default, value),
    aten.permute.default: _inverse_permute,
}


def _storages(node: Any) -> set[int]:
    """Where the tensors that ``node`` gives lie."""
    return {value.untyped_storage()._cdata for value in tensors(node)}


def _sizes(node: fx.Node, write: fx.Node) -> list[int]:
    """Of all axes of ``node``, to be given to a reshape: -1 for the one that is symbolic."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        raise UnknownWriteError(f"{place_of(write)} writes into {node.name}, which has several symbolic sizes")
    return sizes


def _places(value: Any) -> Any:
    """Which elements of its memory a tensor has, in which order, and how they are read. Symbols are compared by name."""
    if not isinstance(value, torch.Tensor):
        return None
    layout = (sizes_by_name(value), list(map(str, value.stride())), str(value.storage_offset()))
    return *layout, value.dtype, value.is_conj(), value.is_neg()


def _is_laid_out(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Does every view of the old value work on the new one?"""
    return list(map(str, new.stride())) == list(map(str, old.stride()))
