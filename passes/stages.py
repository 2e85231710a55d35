"""What holds at each stage, checked between lists of passes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from cachec.passes.base import Graphs, Stage, compute_graphs, outputs, placeholders, tensors
from cachec.passes.drop_asserts import ASSERTS
from cachec.runtime.abi import (
    ADVANCE,
    BASE,
    BASE_SHARE,
    BIAS,
    COEFFICIENTS,
    COMPUTE,
    DELTA,
    FEATURE,
    FEATURES,
    FORECAST,
    GUIDANCE,
    GUIDE,
    MODEL,
    NEGATIVE,
    NEXT_LATENTS,
    POSITIVE,
    PROLOGUE,
    TOKENS,
    VELOCITIES,
    VELOCITY,
    history_name,
)
from cachec.runtime.errors import PassError

LOW = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class GraphSpec:
    """One graph of a stage: inputs that it must have, outputs that it may have (all of ``gives`` must be there)."""

    gives: frozenset[str]
    takes: frozenset[str] = frozenset()
    may_give: frozenset[str] = frozenset()
    optional: bool = False


@dataclass(frozen=True)
class StageSpec:
    """The graphs of a stage, and what else must hold."""

    graphs: dict[str, GraphSpec]
    rules: tuple[Callable[[Graphs], Iterable[str]], ...] = field(default_factory=tuple)


def _spec(gives: Iterable[str], takes: Iterable[str] = (), *, may: Iterable[str] = (), optional: bool = False) -> GraphSpec:
    return GraphSpec(frozenset(gives), frozenset(takes), frozenset(may), optional)


def _types(graphs: Graphs) -> Iterable[str]:
    """No complex value, and beside float32 one floating type."""
    found: set[torch.dtype] = set()
    for name, module in graphs.modules.items():
        for node in module.graph.nodes:
            for value in tensors(node):
                if value.is_complex():
                    yield f"{name}: {node.name} is complex"
                found |= {value.dtype} & LOW
    if len(found) > 1:
        yield f"values of {' and '.join(sorted(map(str, found)))} are mixed"


def _canonical(graphs: Graphs) -> Iterable[str]:
    """Nothing that only checks, nothing that writes."""
    for name, module in graphs.modules.items():
        for node in module.graph.nodes:
            if node.target in ASSERTS:
                yield f"{name}: {node.name} only checks"
            elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                yield f"{name}: {node.name} writes into what it is given"


def _wide_results(graphs: Graphs) -> Iterable[str]:
    """Velocities and latents are float32 where the slots do not hold them in another type."""
    for name, module in graphs.modules.items():
        for label in (VELOCITY, NEXT_LATENTS):
            node = outputs(module).get(label) if name != PROLOGUE else None
            held = label == VELOCITY and ADVANCE in graphs.modules and FORECAST not in graphs.modules
            if node is not None and not held:
                yield from (f"{name}: {label} is {v.dtype}" for v in tensors(node) if v.dtype != torch.float32)


def _cut(graphs: Graphs) -> Iterable[str]:
    """What the tail reads is what the body gives, and its weights are the body's."""
    if FORECAST not in graphs.modules:
        return
    compute, forecast = graphs.modules[COMPUTE], graphs.modules[FORECAST]
    given, read = outputs(compute)[FEATURE].meta["val"], placeholders(forecast)[FEATURE].meta["val"]
    if (given.dtype, _sizes(given)) != (read.dtype, _sizes(read)):
        yield f"compute gives a feature {_sizes(given)} {given.dtype}, forecast reads {_sizes(read)} {read.dtype}"
    own = {id(parameter) for parameter in compute.parameters()}
    yield from (f"forecast holds {name} for itself" for name, p in forecast.named_parameters() if id(p) not in own)


def _linear(graphs: Graphs) -> Iterable[str]:
    """The forecast sum is a node of its graph, and is marked."""
    names = {node.name for node in graphs.modules[FORECAST].graph.nodes} if FORECAST in graphs.modules else set()
    if FORECAST in graphs.modules and graphs.cut not in names:
        yield f"the forecast feature is not marked: cut is {graphs.cut}"


def _inputs_are_read(graphs: Graphs) -> Iterable[str]:
    for name, module in graphs.modules.items():
        if name not in compute_graphs(graphs):
            yield from (f"{name} does not read {label}" for label, node in placeholders(module).items() if not node.users)


def _sizes(value: torch.Tensor) -> list[int]:
    """Without the batch, whose symbol has another name in every graph."""
    return [int(size) for size in value.shape[1:]]


_MODEL = _spec([VELOCITY], may=[TOKENS])
_STEP = _spec([VELOCITY, FEATURE])
SPECS = {
    Stage.CAPTURED: StageSpec({MODEL: _MODEL}, (_wide_results,)),
    Stage.CANONICAL: StageSpec({MODEL: _MODEL}, (_wide_results, _canonical, _types)),
    Stage.SPLIT: StageSpec(
        {COMPUTE: _spec([VELOCITY, FEATURE], may=[TOKENS]), FORECAST: _spec([VELOCITY], [FEATURE], optional=True)},
        (_wide_results, _canonical, _types, _cut),
    ),
    Stage.LINEAR: StageSpec(
        {COMPUTE: _STEP, FORECAST: _spec([VELOCITY], [FEATURES, COEFFICIENTS, BIAS])},
        (_wide_results, _canonical, _types, _linear),
    ),
    Stage.INLINED: StageSpec(
        {COMPUTE: _STEP, FORECAST: _spec([VELOCITY], [history_name(0)], may=[FEATURE])}, (_wide_results, _canonical, _types)
    ),
    Stage.ENGINE: StageSpec(
        {
            PROLOGUE: GraphSpec(frozenset(), optional=True),
            COMPUTE: _spec([VELOCITY, FEATURE, NEXT_LATENTS], [DELTA]),
            FORECAST: _spec([NEXT_LATENTS], may=[VELOCITIES, VELOCITY, FEATURE], optional=True),
            ADVANCE: _spec([NEXT_LATENTS], [BASE, BASE_SHARE, VELOCITIES, COEFFICIENTS]),
            GUIDE: _spec([VELOCITY], [NEGATIVE, POSITIVE, GUIDANCE], optional=True),
        },
        (_wide_results, _canonical, _types, _inputs_are_read),
    ),
}


def check_stage(graphs: Graphs, stage: Stage, *, after: str = "") -> None:
    """Check that ``graphs`` are what ``stage`` says.

    Raises:
        PassError: with the first thing that is wrong; ``after`` names the passes that made the graphs.
    """
    wrong = next(iter(_broken(graphs, stage)), None)
    if wrong is not None:
        raise PassError(f"the graphs are not {stage.value}{f' after {after}' if after else ''}: {wrong}")


def _broken(graphs: Graphs, stage: Stage) -> Iterable[str]:
    if graphs.stage is not None and graphs.stage != stage:
        yield f"they are {graphs.stage.value}"
    spec = SPECS[stage]
    known = {name: COMPUTE if name in compute_graphs(graphs) else name for name in graphs.modules}
    yield from (f"there is a graph {name!r}" for name, kind in known.items() if kind not in spec.graphs)
    yield from (f"there is no graph {n!r}" for n, one in spec.graphs.items() if not one.optional and n not in graphs.modules)
    for name, kind in known.items():
        one, module = spec.graphs[kind], graphs.modules[name]
        yield from (f"{name} has no input {label!r}" for label in sorted(one.takes - placeholders(module).keys()))
        yield from (f"{name} does not give {label!r}" for label in sorted(one.gives - outputs(module).keys()))
        if kind != PROLOGUE:
            strange = outputs(module).keys() - one.gives - one.may_give
            yield from (f"{name} gives {label!r}, too" for label in sorted(strange))
    for rule in spec.rules:
        yield from rule(graphs)
