"""What a pass is: a frozen dataclass from graphs to new graphs, with a contract that is checked around every run."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Any, ClassVar

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from cachec.runtime.abi import COMPUTE

NO_WORD = re.compile(r"\W")  # in paths of modules: dots, and Z-Image has all_x_embedder.2-1
CAST = torch.ops.aten._to_copy.default  # to another type: the form that ONNX has a function for


class Stage(Enum):
    """What the graphs are between two lists of passes; ``passes/stages.py`` says what holds then."""

    CAPTURED = "captured"  # the model as torch.export gives it
    CANONICAL = "canonical"  # in operators that every back end takes
    SPLIT = "split"  # cut in two; on the output cut without the forecast graph
    LINEAR = "linear"  # the forecast is a weighted sum of features
    INLINED = "inlined"  # the forecast graph holds a predictor
    ENGINE = "engine"  # with prologue, sampler, runs of forecasts: what engines are built from


@dataclass(frozen=True)
class Groups:
    """Parts of what forecasts are made of, ``sizes`` one behind the other along an ``axis``: each has weights of its own.

    The batch is axis 0. Without sizes there is one group, all of it; with ``by_row`` each row of a batch has weights of its
    own instead, as branches of guidance may.
    """

    sizes: tuple[int, ...] = ()
    axis: int = 1
    by_row: bool = False

    @property
    def count(self) -> int:
        return max(1, len(self.sizes))

    def shapes(self, whole: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each part, of one of the ``whole`` shape; the batch is left out of both."""
        at = self.axis - 1
        return [(*whole[:at], size, *whole[at + 1 :]) for size in self.sizes] or [tuple(whole)]

    def part(self, number: int) -> tuple[int, int]:
        """Where a part begins and ends along the axis; the last one ends where all does."""
        begin = sum(self.sizes[:number])
        return begin, sys.maxsize if number + 1 == self.count else begin + self.sizes[number]


ALL, BY_ROW = Groups(), Groups(by_row=True)


@dataclass(frozen=True)
class Graphs:
    """What flows through the passes.

    ``modules`` holds ``model`` before the split and ``compute`` and ``forecast`` after it, later ``prologue`` and
    ``advance``. ``cut`` names the node whose value crosses from body to tail, in the forecast graph once that makes the
    feature itself. ``axes`` names, by module and tensor, the leading axes with symbolic sizes; tensors that it does not list
    have a batch in front. ``editable`` modules belong to the list of passes that is running, which may edit them in place.
    ``groups``: of what linear forecasts are made of.
    """

    modules: Mapping[str, fx.GraphModule]
    cut: str | None = None
    axes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    stage: Stage | None = None
    editable: frozenset[str] = frozenset()
    groups: Groups = ALL

    def with_modules(self, **modules: fx.GraphModule) -> "Graphs":
        return replace(self, modules=modules)


def compute_graphs(graphs: Graphs) -> tuple[str, ...]:
    """The names of the graphs that run the whole model: there may be several beside the first."""
    return tuple(name for name in graphs.modules if name == COMPUTE or name.startswith(f"{COMPUTE}_"))


class Equivalence(IntEnum):
    """How graphs compare with what they were made from, from the strictest on."""

    EXACT = 0  # bit by bit
    ROUNDING = 1  # sums in another order, products of other sizes
    PRECISION = 2  # values of another type


@dataclass(frozen=True)
class PassResult:
    """New graphs, and whether they differ from the old ones."""

    graphs: Graphs
    changed: bool


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation. Fields are its options. It leaves graphs that are not ``editable`` alone."""

    name: ClassVar[str]
    equivalence: ClassVar[Equivalence] = Equivalence.EXACT

    def requires(self, graphs: Graphs) -> None:
        """Raise ``PassError`` if the pass cannot work on ``graphs``."""

    @abstractmethod
    def run(self, graphs: Graphs) -> PassResult:
        """Transform."""

    def ensures(self, graphs: Graphs) -> None:
        """Raise ``PassError`` if the result is not what the pass promises."""


@dataclass(frozen=True)
class GraphPass(Pass):
    """A pass that treats every graph by itself, or those named ``only``: it finds places, and edits them."""

    only: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        """The nodes to edit. Without any, the graph is handed on as it is."""

    @abstractmethod
    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        """Edit ``module`` in place."""

    def run(self, graphs: Graphs) -> PassResult:
        edited: dict[str, fx.GraphModule] = {}
        for name, module in graphs.modules.items():
            found = self.places(module) if self.only is None or name in self.only else []
            if found:
                edited[name], nodes = writable(graphs, name)
                self.edit(edited[name], [nodes(node) for node in found])
                finish(edited[name])
        return PassResult(graphs.with_modules(**{**graphs.modules, **edited}) if edited else graphs, changed=bool(edited))


Observer = Callable[[int, Pass, PassResult], None]


def writable(graphs: Graphs, name: str) -> tuple[fx.GraphModule, Callable[[fx.Node], fx.Node]]:
    """The module ``name`` to be edited, a copy unless it is editable, and what its nodes are called there."""
    module = graphs.modules[name]
    if name in graphs.editable:
        return module, lambda node: node
    copy, nodes = _copied(module)
    return copy, nodes.__getitem__


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; parameters and buffers stay the same objects."""
    return _copied(module)[0]


def _copied(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, values))
    for old_node, new_node in values.items():
        new_node.meta = dict(old_node.meta)
    new = fx.GraphModule(module, graph)
    new.meta.update(module.meta)
    return new, values


def finish(module: fx.GraphModule) -> None:
    """Drop dead nodes and what no node reads any more; regenerate the code of an edited module."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    _drop_attributes(module)
    module.recompile()


def _drop_attributes(module: fx.GraphModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for held in (module.named_parameters, module.named_buffers):
        for name, _ in [*held(remove_duplicate=False)]:
            if name not in read:
                owner, _, last = name.rpartition(".")
                delattr(module.get_submodule(owner), last)
    if any(True for _ in module.children()):
        module.delete_all_unused_submodules()


def is_live(node: fx.Node) -> bool:
    """Does anything read it, or must it stay anyway?"""
    return bool(node.users) or node.is_impure()  # as inputs and the output are


def inline(
    graph: fx.Graph,
    module: fx.GraphModule,
    attributes: dict[str, torch.Tensor],
    given: Mapping[str, fx.Node] | None = None,
    *,
    prefix: str = "",
) -> dict[str, fx.Node]:
    """Copy ``module`` to the end of ``graph``; returns its results.

    Its inputs ``given`` are nodes of ``graph``, all others become inputs. Its weights go to ``attributes``, their names behind
    ``prefix``, which keeps those of several modules apart.
    """
    values = {node: given[name] for name, node in placeholders(module).items() if given and name in given}
    for node in module.graph.nodes:
        if node.op == "output" or node in values:
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = dict(node.meta)
        if node.op == "get_attr":
            name = prefix + NO_WORD.sub("_", str(node.target)) if prefix else str(node.target)
            values[node].target = name
            attributes[name] = fetch(module, str(node.target))
    return {name: values[node] for name, node in outputs(module).items()}


def emit(like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with the metadata of ``like`` and the value that ``op`` gives."""
    node = like.graph.call_function(op, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta = {**like.meta, "val": shape_of(op, *values[0], **values[1])}
    return node


def shape_of(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``op`` gives for the values of nodes: shapes and types.

    Through Python's dispatcher: C++ takes no symbolic sizes in operators that are made of others, before torch 2.13.
    """
    with enable_python_dispatcher():
        return op(*args, **kwargs)


def depends_on_inputs(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value can change from call to call."""
    dependent: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(argument in dependent for argument in node.all_input_nodes):
            dependent.add(node)
    return dependent


def backward_slice(results: Iterable[fx.Node], ends: Container[fx.Node] = ()) -> set[fx.Node]:
    """What ``results`` need, themselves included, and nothing beyond ``ends``."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend([] if node in ends else node.all_input_nodes)
    return needed


def placeholders(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Inputs of a graph by name, in order."""
    return {str(node.target): node for node in module.graph.nodes if node.op == "placeholder"}


def outputs(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Outputs of a graph by name: graphs return a dictionary."""
    result: dict[str, fx.Node] = next(iter(reversed(module.graph.nodes))).args[0]
    return result


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The values of a node that are tensors: a node may give several, or a size."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]


def sizes_by_name(value: torch.Tensor) -> list[str]:
    """Of all axes; comparing symbolic sizes themselves would pin them down."""
    return list(map(str, value.shape))


def fetch(module: fx.GraphModule, target: str) -> Any:
    """The parameter, buffer or constant that a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
