"""What a pass is: a frozen dataclass from graphs to new graphs, with a contract that is checked around every run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.runtime.errors import PassError, PredictorError
from cachec.runtime.files import write_file


@dataclass(frozen=True)
class Graphs:
    """What flows through the passes.

    ``modules`` holds ``model`` before the split and ``compute`` and ``forecast`` after it, later ``prologue`` and
    ``advance``. ``cut`` names the node whose value crosses from body to tail, in the forecast graph once the predictor is
    there. ``rows`` is what folding the predictor left: coefficients [T, W] and bias [T]. ``axes`` names, by module and
    tensor, the leading axes with symbolic sizes, and that of ``groups``, which is fixed; tensors that it does not list have a
    batch in front.
    """

    modules: Mapping[str, fx.GraphModule]
    cut: str | None = None
    rows: "PredictorRows | None" = None
    axes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def with_modules(self, **modules: fx.GraphModule) -> "Graphs":
        return replace(self, modules=modules)


@dataclass(frozen=True, eq=False)
class PredictorRows:
    """A folded predictor: at step ``s`` it is ``sum_m coefficients[s, m] history_m + bias[s]``, newest first, float64."""

    coefficients: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class PassResult:
    """New graphs, and whether they differ from the old ones."""

    graphs: Graphs
    changed: bool


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation. Fields are its options. It leaves the graphs that it is given alone."""

    name: ClassVar[str]

    def requires(self, graphs: Graphs) -> None:
        """Raise ``PassError`` if the pass cannot work on ``graphs``."""

    @abstractmethod
    def run(self, graphs: Graphs) -> PassResult:
        """Transform."""

    def ensures(self, graphs: Graphs) -> None:
        """Raise ``PassError`` if the result is not what the pass promises."""


@dataclass(frozen=True)
class GraphPass(Pass):
    """A pass that treats every graph by itself, or those named ``only``, by editing a copy of it."""

    only: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def edit(self, module: fx.GraphModule) -> int:
        """Edit ``module`` in place; return how many places changed."""

    def run(self, graphs: Graphs) -> PassResult:
        chosen = graphs.modules if self.only is None else {n: m for n, m in graphs.modules.items() if n in self.only}
        copies = {name: copy_module(module) for name, module in chosen.items()}
        changes = sum(self.edit(module) for module in copies.values())
        if not changes:
            return PassResult(graphs, changed=False)
        for module in copies.values():
            finish(module)
        # copied again, so that attributes which the edit left unread are gone
        copies = {name: copy_module(module) for name, module in copies.items()}
        return PassResult(graphs.with_modules(**{**graphs.modules, **copies}), changed=True)


Observer = Callable[[int, Pass, PassResult], None]


def run_passes(graphs: Graphs, passes: Sequence[Pass], *, observers: Sequence[Observer] = ()) -> Graphs:
    """Run ``passes`` in order, checking each contract and linting every graph after each.

    Raises:
        PassError, PredictorError: with the failing pass and those that ran before it.
    """
    done: list[str] = []
    for index, one in enumerate(passes):
        try:
            one.requires(graphs)
            result = one.run(graphs)
            for module in result.graphs.modules.values():
                module.graph.lint()
            one.ensures(result.graphs)
            for observe in observers:
                observe(index, one, result)
        except (PassError, PredictorError, RuntimeError) as error:
            kind = PredictorError if isinstance(error, PredictorError) else PassError
            raise kind(f"pass {one.name!r} (after {', '.join(done) or 'none'}): {error}") from error
        graphs = result.graphs
        done.append(one.name)
    return graphs


def dump_to(directory: Path, *, start: int = 0) -> Observer:
    """An observer that writes the readable graphs after each pass, in files numbered from ``start``."""

    def observe(index: int, one: Pass, result: PassResult) -> None:
        for name, module in result.graphs.modules.items():
            write_file(directory / f"{start + index:02d}-{one.name}.{name}.txt", graph_text(module).encode())

    return observe


def graph_text(module: fx.GraphModule) -> str:
    """The graph, one node a line, with shapes: what ``--dump-graphs`` writes and the golden tests compare."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        shape = f" : {_shape_text(value)}" if isinstance(value, torch.Tensor) else ""
        arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        lines.append(f"{node.op} {node.name} = {node.target}({arguments}){shape}".replace("torch.", ""))
    return "\n".join(lines) + "\n"


def _shape_text(value: torch.Tensor) -> str:
    """Shape and dtype; the batch is the only symbolic size, and its symbol's number differs from run to run."""
    sizes = ", ".join("B" if isinstance(size, torch.SymInt) else str(size) for size in value.shape)
    return f"[{sizes}] {value.dtype}"


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; parameters and buffers stay the same objects."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, values))
    new = fx.GraphModule(module, graph)
    new.meta.update(module.meta)
    for old_node, new_node in values.items():
        new_node.meta = dict(old_node.meta)
    return new


def finish(module: fx.GraphModule) -> None:
    """Drop dead nodes and regenerate the code of an edited module."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def emit(like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with the metadata of ``like`` and the value that ``op`` gives."""
    node = like.graph.call_function(op, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta = {**like.meta, "val": op(*values[0], **values[1])}
    return node


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


def fetch(module: fx.GraphModule, target: str) -> Any:
    """The parameter, buffer or constant that a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
