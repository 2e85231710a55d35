"""Lists of passes, and running them: every contract is checked, before, between and after."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from cachec.passes.base import Equivalence, Graphs, Observer, Pass, PassResult, Stage
from cachec.passes.stages import check_stage
from cachec.runtime.errors import PassError, PredictorError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassList:
    """Passes that lead from one stage to another, and how what they make compares with what they are given."""

    stage_in: Stage
    passes: tuple[Pass, ...]
    stage_out: Stage
    equivalence: Equivalence

    def __post_init__(self) -> None:
        weaker = [one.name for one in self.passes if one.equivalence > self.equivalence]
        if weaker:
            raise PassError(f"a list that is {self.equivalence.name.lower()} holds {', '.join(weaker)}")

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)


def run_passes(graphs: Graphs, passes: Sequence[Pass | PassList], *, observers: Sequence[Observer] = ()) -> Graphs:
    """Run ``passes`` in order, checking each contract, every edited graph, and the stages around every list.

    The modules of ``graphs`` stay as they are. What a pass has made is edited in place by those after it.

    Raises:
        PassError, PredictorError: with the failing pass and those that ran before it.
    """
    given = {id(module) for module in graphs.modules.values()}
    done: list[str] = []
    for item in passes:
        if isinstance(item, PassList):
            check_stage(graphs, item.stage_in)
        for one in item if isinstance(item, PassList) else (item,):
            graphs = _run_one(graphs, one, done, observers)
            graphs = _editable(graphs, {name for name, module in graphs.modules.items() if id(module) not in given})
            done.append(one.name)
        if isinstance(item, PassList):
            graphs = replace(graphs, stage=item.stage_out)
            check_stage(graphs, item.stage_out, after=", ".join(one.name for one in item))
    return _editable(graphs, set())


def _editable(graphs: Graphs, names: set[str]) -> Graphs:
    return graphs if graphs.editable == names else replace(graphs, editable=frozenset(names))


def _run_one(graphs: Graphs, one: Pass, done: list[str], observers: Sequence[Observer]) -> Graphs:
    try:
        one.requires(graphs)
        result = one.run(graphs)
        one.ensures(result.graphs)
        for observe in observers:
            observe(len(done), one, result)
    except (PassError, PredictorError, RuntimeError) as error:
        kind = PredictorError if isinstance(error, PredictorError) else PassError
        raise kind(f"pass {one.name!r} (after {', '.join(done) or 'none'}): {error}") from error
    sizes = ", ".join(f"{name} {len(module.graph.nodes)}" for name, module in result.graphs.modules.items())
    log.info("pass %s: %s (nodes: %s)", one.name, "changed" if result.changed else "nothing to do", sizes)
    return result.graphs


def dump_to(directory: Path) -> Observer:
    """An observer that writes the readable graphs after each pass, in numbered files."""
    numbers = itertools.count()

    def observe(index: int, one: Pass, result: PassResult) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        number = next(numbers)
        for name, module in result.graphs.modules.items():
            path = directory / f"{number:02d}-{one.name}.{name}.txt"
            path.write_text(graph_text(module))

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
