"""Weights are named, not held: what a graph's weights are made of, and their values when they are wanted.

The graphs of a model on disk hold fake parameters: shape and type, no values. What passes make of them (casts,
concatenations, …) is recorded as an expression, and evaluated tensor by tensor where it is written to a file, or put where a
graph runs. Weights in memory (of a module that was handed in, of a trained predictor) are their own values.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from cachec.compiler.models.shards import Shards, Stored
from cachec.passes import Graphs
from cachec.passes.base import CAST, copy_module, fetch
from cachec.runtime.errors import PassError

aten = torch.ops.aten
LARGE = 2 << 30  # bytes of weights in the type that they are captured in
SAME = (aten.detach.default, aten.alias.default)  # give what they are given


@dataclass(frozen=True, eq=False)
class Expression:
    """What a weight is: a stored tensor, ``shards`` and ``name``, or an operator on expressions, tensors and other values.

    ``dtype``: a stored tensor is cast to it.
    """

    dtype: torch.dtype
    shards: Shards | None = None
    name: str = ""
    operator: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Any = None

    @property
    def key(self) -> Hashable:
        """The same for expressions of the same value; its ``repr`` is the same in all processes that open the same files."""
        if self.shards is not None:
            return (self.shards.key(self.name), self.dtype)
        return (str(self.operator), _key(self.args), _key(self.kwargs))

    @property
    def is_updated(self) -> bool:
        """Is anything in it changed by a LoRA?"""
        if self.shards is not None:
            return self.name in self.shards.updates
        parts = pytree.tree_leaves((self.args, self.kwargs))
        return any(part.is_updated for part in parts if isinstance(part, Expression))

    def pieces(self, device: torch.device) -> Iterator[torch.Tensor]:
        """The value, as tensors to be joined along the first axis: what is joined by a pass need not be in memory whole."""
        if self.operator is aten.cat.default and (len(self.args) == 1 or self.args[1] == 0):
            for part in self.args[0]:  # a trained predictor's weights are in memory
                yield from part.pieces(device) if isinstance(part, Expression) else (part.detach().to(device),)
        else:
            yield self.value(device)

    @torch.no_grad()
    def value(self, device: torch.device) -> torch.Tensor:
        """The tensor."""
        if self.shards is not None:
            return self.shards.read(self.name).to(device).to(self.dtype)
        args, kwargs = pytree.tree_map_only(Expression, lambda one: one.value(device), (self.args, self.kwargs))
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda one: one.to(device), (args, kwargs))
        made: torch.Tensor = self.operator(*args, **kwargs)
        return made


_KNOWN = WeakTensorKeyDictionary()  # fake tensors, and the expression of each: a fact that does not change


def expression(tensor: torch.Tensor) -> Expression:
    """What a fake tensor is made of.

    Raises:
        PassError: it was made outside of :func:`recording`, or by an operator that gives several.
    """
    if tensor not in _KNOWN:
        raise PassError(f"a weight {list(tensor.shape)} {tensor.dtype} has no value: it was not seen how a pass made it")
    found: Expression = _KNOWN[tensor]
    return found


def is_named(tensor: Any) -> bool:
    """Is it without a value of its own?"""
    return isinstance(tensor, FakeTensor)


def has_values(module: nn.Module) -> bool:
    """Can the module be run: are all its weights in memory, or in files?"""
    named = [_KNOWN[one] for one in module.parameters() if is_named(one)]
    return all(one.shards is None or one.name in one.shards.places for one in named)


def is_large(module: nn.Module) -> bool:
    """Would it take long, or much memory, to run the module on the CPU?"""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) > LARGE


def named_module(stored: Stored) -> nn.Module:
    """The module with float32 parameters that are fake, and named after the tensors in its files; buffers are real."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # as arguments of passes: tables
    for name, parameter in list(stored.module.named_parameters()):
        if is_named(parameter):  # since it was captured in another size
            continue
        owner, _, last = name.rpartition(".")
        with mode:
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        _KNOWN[fake] = Expression(torch.float32, stored.shards, name)
        setattr(stored.module.get_submodule(owner), last, fake)
    return stored.module


def without_values(module: nn.Module, beside: nn.Module) -> nn.Module:
    """The module with parameters that have no values, to be captured with those of another that has none; for estimates."""
    modes = [one.fake_mode for one in beside.parameters() if isinstance(one, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    for name, parameter in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        with mode:
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
        _KNOWN[fake] = Expression(torch.float32, operator="no value", args=(name,))
        setattr(module.get_submodule(owner), last, fake)
    return module


@contextmanager
def recording() -> Iterator[None]:
    """Within it, what is made of named weights has an expression, too."""
    with _Recorder():  # type: ignore[no-untyped-call]
        yield


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if isinstance(made, FakeTensor):
            given = [value for value in pytree.tree_leaves((args, kwargs)) if is_named(value)]
            if given and all(value in _KNOWN for value in given):
                _KNOWN[made] = _made(func, args, kwargs, made.dtype)
        return made


def _made(operator: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Expression:
    """The expression of what ``operator`` gives. A stored tensor that is cast is read in the new type."""
    args, kwargs = pytree.tree_map_only(FakeTensor, lambda value: _KNOWN[value], (tuple(args), kwargs))
    if operator in (*SAME, CAST) and isinstance(first := args[0], Expression):
        if operator in SAME:
            return first
        if first.shards is not None and _is_exact(first, dtype):
            return replace(first, dtype=dtype)
    return Expression(dtype, operator=operator, args=args, kwargs=kwargs)


def _is_exact(stored: Expression, dtype: torch.dtype) -> bool:
    """Does a cast on the way change nothing? What is stored fits into it, or is what is wanted in the end."""
    assert stored.shards is not None
    kept = stored.shards.dtype(stored.name)
    if kept is None:  # nothing is read that could be rounded
        return True
    return torch.promote_types(kept, stored.dtype) == stored.dtype or kept == dtype


def _key(value: Any) -> Hashable:
    if isinstance(value, Expression):
        return value.key
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return (hashlib.sha256(content.data).hexdigest(), tuple(value.shape), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in sorted(value.items()))
    return repr(value)


class Values:
    """Values of weights on a device; each expression is evaluated once, and shared, as long as this object lives."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._made: dict[Hashable, tuple[Expression, torch.Tensor]] = {}  # keys hold while there is what they are of
        self._parameters: dict[Hashable, nn.Parameter] = {}
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by what they were, which is held

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of a weight; one in memory is itself, moved to the device."""
        if not is_named(tensor):
            return tensor if tensor.device == self._device else self._there(tensor)
        what = expression(tensor)
        key = what.key
        if key not in self._made:
            self._made[key] = what, what.value(self._device)
        if not isinstance(tensor, nn.Parameter):
            return self._made[key][1]
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(self._made[key][1], requires_grad=False)
        return self._parameters[key]

    def key(self, tensor: torch.Tensor) -> Hashable:
        """The same for named weights of the same value, in all processes."""
        return expression(tensor).key

    def pieces(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The value of a named weight, in tensors to be joined along the first axis; nothing of it is kept."""
        return expression(tensor).pieces(self._device)

    def is_changed(self, tensor: torch.Tensor) -> bool:
        """Is a weight changed by a LoRA?"""
        return is_named(tensor) and expression(tensor).is_updated

    def graphs(self, graphs: Graphs) -> Graphs:
        """The graphs with values in place of named weights."""
        return replace(graphs, modules={name: self.module(module) for name, module in graphs.modules.items()})

    def module(self, module: fx.GraphModule) -> fx.GraphModule:
        """A graph with values in place of named weights, on the device; itself if it is that already."""
        held = {str(node.target): fetch(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr"}
        values = {name: self.of(tensor) for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}
        new = {name: value for name, value in values.items() if value is not held[name]}
        if not new and not any(map(self._is_elsewhere, module.graph.nodes)):
            return module
        copy = copy_module(module)
        for name, value in new.items():
            owner, _, last = name.rpartition(".")
            part = copy.get_submodule(owner)
            delattr(part, last)
            if isinstance(value, nn.Parameter):
                part.register_parameter(last, value)
            else:
                part.register_buffer(last, value)
        for node in filter(self._is_elsewhere, copy.graph.nodes):
            node.kwargs = {**node.kwargs, "device": self._device}
        copy.recompile()
        return copy

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._moved:
            moved = tensor.detach().to(self._device)
            wanted = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
            self._moved[id(tensor)] = tensor, wanted
        return self._moved[id(tensor)][1]

    def _is_elsewhere(self, node: fx.Node) -> bool:
        """Does it make a tensor on another device?"""
        return node.kwargs.get("device") not in (None, self._device)

    def program(self, program: ExportedProgram) -> ExportedProgram:
        """A program with values in place of named weights; itself if it has none."""
        if not any(map(is_named, program.state_dict.values())):
            return program
        return with_state(program, {name: self.of(value) for name, value in program.state_dict.items()})


def with_state(program: ExportedProgram, state: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The same program with other weights."""
    return ExportedProgram(
        root=nn.Module(),
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=dict(state),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )
