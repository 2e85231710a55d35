"""Move what does not depend on the latents out of the step graphs, into a prologue that runs once per request."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import (
    CAST,
    Equivalence,
    Graphs,
    Pass,
    PassResult,
    compute_graphs,
    copy_module,
    fetch,
    finish,
    outputs,
    placeholders,
)
from cachec.passes.side_by_side import CUTS, RESHAPES, Part, parts_of, size_of, unpack
from cachec.passes.split_model import extract
from cachec.runtime.abi import (
    BATCH,
    COMPUTE,
    FORECAST,
    PROLOGUE,
    STEP_VALUES,
    TARGET_TIMESTEP,
    hoisted_name,
    steps_of,
    timesteps_of,
)
from cachec.runtime.errors import PassError

CONSTANT, REQUEST, STEP, LIVE = range(4)  # what a value depends on, at most
aten = torch.ops.aten


@dataclass(frozen=True)
class Hoist(Pass):
    """Loop-invariant code motion, by data dependence.

    What depends on ``conditions`` only is computed once per request; with ``per_step`` also what depends on ``timestep``
    and on the second time that flow maps are told, for all steps at once: modulations, time embeddings. The step graphs
    read the results as inputs and lose the weights: one input for each value of the request, and one, ``step_values``, for
    all values of the step side by side. The prologue takes the conditions, and the timesteps [T] of each step graph; its
    result for the input ``x`` of a step graph is called ``compute_x`` or ``forecast_x``, [B, …] or [T, B, …]. Batched over
    steps it equals single steps to float rounding. What depends on the step and has an axis of tokens stays: for all steps it
    would cost more memory than it saves time.
    """

    name: ClassVar[str] = "hoist"
    equivalence: ClassVar[Equivalence] = Equivalence.ROUNDING
    timestep: str
    conditions: tuple[str, ...]
    per_step: bool = True

    def requires(self, graphs: Graphs) -> None:
        if COMPUTE not in graphs.modules:
            raise PassError("there is no compute graph; run split_model first")

    def run(self, graphs: Graphs) -> PassResult:
        prologue = _Prologue(self.timestep, self.conditions, _step_graphs(graphs))
        modules = dict(graphs.modules)
        for name in _step_graphs(graphs):
            modules[name] = self._split(name, modules[name], prologue, graphs.axes.get(name, {}))
        if not prologue.results:
            return PassResult(graphs, changed=False)
        modules[PROLOGUE] = prologue.finish()
        axes = {**graphs.axes, PROLOGUE: prologue.axes}
        return PassResult(replace(graphs, modules=modules, axes=axes), changed=True)

    def ensures(self, graphs: Graphs) -> None:
        if PROLOGUE in graphs.modules:
            times = {timesteps_of(owner, second=second) for owner in _step_graphs(graphs) for second in (False, True)}
            strange = set(placeholders(graphs.modules[PROLOGUE])) - {*self.conditions} - times
            if strange:
                raise PassError(f"the prologue reads {sorted(strange)}, which change from step to step")

    def _split(
        self, name: str, module: fx.GraphModule, prologue: "_Prologue", axes: Mapping[str, tuple[str, ...]]
    ) -> fx.GraphModule:
        """The step graph without its invariant part, which goes to ``prologue``."""
        module = copy_module(module)
        _size_from_live_input(module, {self.timestep, TARGET_TIMESTEP, *self.conditions}, axes)
        known = self.levels(module)
        border: dict[fx.Node, str] = {}
        for node in module.graph.nodes:
            if node.op == "output" or known[node] == LIVE:
                for value in node.all_input_nodes:
                    if known[value] in (REQUEST, STEP):
                        source = _unsunk(value, known)
                        if source.op != "placeholder" and source not in border:
                            border[source] = _name_of(source, border.values())
        if not border:
            return module
        packs = dict[torch.dtype, list[fx.Node]]()
        for node, label in border.items():
            if known[node] == REQUEST:
                prologue.add(name, module, node, label, known)
            else:
                packs.setdefault(node.meta["val"].dtype, []).append(node)
        parts = {node: parts_of(node) for nodes in packs.values() for node in nodes}
        inputs = {node: label for node, label in border.items() if node not in parts}
        inputs |= {part.node: f"{border[node]}_part_{i}" for node, some in parts.items() for i, part in enumerate(some)}
        step = extract(module, outputs(module), inputs)
        for dtype, nodes in packs.items():
            label = STEP_VALUES if len(packs) == 1 else f"{STEP_VALUES}_{str(dtype).removeprefix('torch.')}"
            together = [part for node in nodes for part in parts[node]]
            prologue.add_packed(name, module, nodes, together, label, known)
            unpack(step, label, {inputs[part.node]: part for part in together})
        return step

    def levels(self, module: fx.GraphModule) -> dict[fx.Node, int]:
        """What each node depends on."""
        inputs = dict.fromkeys(self.conditions, REQUEST)
        inputs |= dict.fromkeys((self.timestep, TARGET_TIMESTEP), STEP if self.per_step else LIVE)
        known: dict[fx.Node, int] = {}
        batch = {str(node.meta["val"].shape[0]) for name, node in placeholders(module).items() if name in inputs}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = inputs.get(str(node.target), LIVE)
            elif node.target is aten.sym_size.int:
                known[node] = CONSTANT
            else:
                known[node] = max((known[value] for value in node.all_input_nodes), default=CONSTANT)
            if known[node] == STEP and _has_tokens(node):
                known[node] = LIVE
            if _is_batched(node) and str(node.meta["val"].shape[0]) not in batch:  # rows of heads, say
                known[node] = LIVE
        return known


def _step_graphs(graphs: Graphs) -> tuple[str, ...]:
    """What the prologue works for."""
    return *compute_graphs(graphs), *([FORECAST] if FORECAST in graphs.modules else [])


class _Prologue:
    """The graph that is being built. Each part of it runs on a batch of its own: requests, or steps times requests."""

    def __init__(self, timestep: str, conditions: tuple[str, ...], owners: tuple[str, ...]) -> None:
        self._timestep, self._conditions, self._owners = timestep, conditions, owners
        self._graph = fx.Graph()
        self._attributes: dict[str, Any] = {}
        self._inputs: dict[str, fx.Node] = {}
        self._values: dict[tuple[str, int, fx.Node], fx.Node] = {}
        self._nodes: dict[str, fx.Node] = {}
        self.results: dict[str, fx.Node] = {}
        self.axes: dict[str, tuple[str, ...]] = {}

    def add(self, owner: str, module: fx.GraphModule, node: fx.Node, label: str, known: Mapping[fx.Node, int]) -> None:
        """Compute ``node`` of the step graph ``owner`` here."""
        name = hoisted_name(owner, label)
        self.results[name] = self._copy(owner, module, node, REQUEST, known)
        self.axes[name] = (BATCH,)

    def add_packed(
        self,
        owner: str,
        module: fx.GraphModule,
        nodes: list[fx.Node],
        parts: list[Part],
        label: str,
        known: Mapping[fx.Node, int],
    ) -> None:
        """Compute ``nodes``, which depend on the step, here: side by side in one result [T, B, …]."""
        values = [self._copy(owner, module, node, STEP, known) for node in nodes]
        flat = [value if node.meta["val"].ndim == 2
                else self._graph.call_function(aten.reshape.default, (value, [-1, size_of(node)]))
                for value, node in zip(values, nodes, strict=True)]  # fmt: skip
        packed = self._graph.call_function(aten.cat.default, (flat, -1))
        if any(part.added for part in parts):
            name = f"added_{owner}_{label}"
            like = nodes[0].meta["val"]
            added = [torch.full((part.size,), float(part.added), dtype=like.dtype, device=like.device) for part in parts]
            self._attributes[name] = torch.cat(added)
            packed = self._graph.call_function(aten.add.Tensor, (packed, self._graph.get_attr(name)))
        shape: list[fx.Node | int] = [self._num_steps(owner), -1, sum(map(size_of, nodes))]
        name = hoisted_name(owner, label)
        self.results[name] = self._graph.call_function(aten.view.default, (packed, shape))
        self.axes[name] = (steps_of(owner), BATCH)

    def finish(self) -> fx.GraphModule:
        self.axes |= {timesteps_of(o, second=second): (steps_of(o),) for o in self._owners for second in (False, True)}
        self._graph.output(dict(self.results))
        module = fx.GraphModule(self._attributes, _inputs_first(self._graph))
        finish(module)
        return module

    def _copy(self, owner: str, module: fx.GraphModule, node: fx.Node, level: int, known: Mapping[fx.Node, int]) -> fx.Node:
        """The value of ``node`` in the part of ``level``."""
        key = (owner, level, node)
        if key not in self._values:
            self._values[key] = self._make(owner, module, node, level, known)
        return self._values[key]

    def _make(self, owner: str, module: fx.GraphModule, node: fx.Node, level: int, known: Mapping[fx.Node, int]) -> fx.Node:
        if node.target is aten.sym_size.int:
            return self._batch_size(owner, level)
        if level == STEP and known[node] == REQUEST:
            once = self._copy(owner, module, node, REQUEST, known)
            return self._for_each_step(owner, once, node.meta["val"].ndim) if _is_batched(node) else once
        if node.op == "placeholder":
            name = str(node.target)
            told = name in (self._timestep, TARGET_TIMESTEP)
            return self._times(owner, second=name == TARGET_TIMESTEP) if told else self._input(name)
        if node.op == "get_attr":
            return self._attribute(owner, module, str(node.target))
        for value in node.all_input_nodes:  # before this node, so that the graph stays in order
            self._copy(owner, module, value, level, known)
        new = self._graph.node_copy(node, lambda value: self._copy(owner, module, value, level, known))
        new.meta = {k: v for k, v in node.meta.items() if k != "val"}  # its batch is another one
        return new

    def _input(self, name: str) -> fx.Node:
        if name not in self._inputs:
            self._inputs[name] = self._graph.placeholder(name)
        return self._inputs[name]

    def _attribute(self, owner: str, module: fx.GraphModule, target: str) -> fx.Node:
        value = fetch(module, target)
        name = target if self._attributes.get(target, value) is value else f"{owner}_{target}"
        if name not in self._attributes:
            self._attributes[name] = value
            self._nodes[name] = self._graph.get_attr(name)
        return self._nodes[name]

    def _request_size(self) -> fx.Node:
        """B."""
        first = next((n for n in self._conditions if n in self._inputs), self._conditions[0])
        return self._node("batch", lambda: self._graph.call_function(aten.sym_size.int, (self._input(first), 0)))

    def _num_steps(self, owner: str) -> fx.Node:
        """T of a step graph."""
        times = self._input(timesteps_of(owner))
        return self._node(f"steps {owner}", lambda: self._graph.call_function(aten.sym_size.int, (times, 0)))

    def _times(self, owner: str, *, second: bool = False) -> fx.Node:
        """Timesteps [T * B], or the ``second`` times of flow maps: those of a step lie together."""
        name = timesteps_of(owner, second=second)
        times, steps, batch = self._input(name), self._num_steps(owner), self._request_size()

        def make() -> fx.Node:
            column = self._graph.call_function(aten.unsqueeze.default, (times, 1))
            wide = self._graph.call_function(aten.expand.default, (column, [steps, batch]))
            return self._graph.call_function(aten.reshape.default, (wide, [-1]))

        return self._node(f"times {name}", make)

    def _batch_size(self, owner: str, level: int) -> fx.Node:
        if level != STEP:
            return self._request_size()
        times = self._times(owner)
        return self._node(f"size {owner}", lambda: self._graph.call_function(aten.sym_size.int, (times, 0)))

    def _for_each_step(self, owner: str, value: fx.Node, rank: int) -> fx.Node:
        """From [B, …] to [T * B, …]; ``rank`` before."""
        steps = self._num_steps(owner)

        def make() -> fx.Node:
            many = self._graph.call_function(aten.unsqueeze.default, (value, 0))
            wide = self._graph.call_function(aten.expand.default, (many, [steps, *[-1] * rank]))
            return self._graph.call_function(aten.flatten.using_ints, (wide, 0, 1))

        return self._node(f"each {owner} {value.name}", make)

    def _node(self, key: str, make: Any) -> fx.Node:
        if key not in self._nodes:
            self._nodes[key] = make()
        return self._nodes[key]


def _size_from_live_input(module: fx.GraphModule, invariant: set[str], axes: Mapping[str, tuple[str, ...]]) -> None:
    """Take the batch size from an input that stays, not from a condition that may leave."""
    stay = {name: node for name, node in placeholders(module).items() if name not in invariant}
    live, axis = next((n, axes.get(k, (BATCH,)).index(BATCH)) for k, n in stay.items() if BATCH in axes.get(k, (BATCH,)))
    sizes = [node for node in module.graph.nodes if node.target is aten.sym_size.int]
    if not sizes:
        return
    first = next(iter(module.graph.nodes))
    if first is not live:
        first.prepend(live)
    with module.graph.inserting_after(live):
        size = module.graph.call_function(aten.sym_size.int, (live, axis))
    size.meta = dict(sizes[0].meta)
    for node in sizes:
        if node.args[1] != 0:
            raise PassError(f"{node} reads a symbolic size of axis {node.args[1]}: only the batch is symbolic")
        node.replace_all_uses_with(size)
    finish(module)


def _unsunk(node: fx.Node, known: Mapping[fx.Node, int]) -> fx.Node:
    """The value that ``node`` is a mere view of."""
    while _is_view(node):
        node = next(value for value in node.all_input_nodes if known[value] in (REQUEST, STEP))
    return node


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    scalar = node.target is aten.add.Tensor and len(node.all_input_nodes) == 1
    return node.target in RESHAPES or node.target in CUTS or node.target is operator.getitem or scalar or _is_widened(node)


def _is_widened(node: fx.Node) -> bool:
    """A cast that adds bytes: the narrow value is what is handed over."""
    if node.target is not CAST:
        return False
    given, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(given.element_size() < made.element_size())


def _has_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and math.prod(int(size) for size in value.shape[1:-1]) > 1


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)


def _name_of(node: fx.Node, taken: Any) -> str:
    """Its module's path, as a name."""
    path = [str(one[0] if isinstance(one, tuple) else one) for one in (node.meta.get("nn_module_stack") or {}).values()]
    name = base = re.sub(r"\W", "_", path[-1] if path else "") or node.name  # a name of Python, whatever parts are called
    number = 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _inputs_first(graph: fx.Graph) -> fx.Graph:
    """The same graph with its inputs and attributes before everything else."""
    new, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for early in (True, False):
        for node in graph.nodes:
            if (node.op in ("placeholder", "get_attr")) == early:
                values[node] = new.node_copy(node, values.__getitem__)
    return new
