"""From rewritten graphs to what an engine builder takes: exported programs with their signatures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram

from cachec.compiler.graphs.exported import export_program
from cachec.passes import Graphs, Groups, compute_graphs
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import (
    ADVANCE,
    BASE,
    BASE_SHARE,
    BATCH,
    BIAS,
    CARRY,
    COEFFICIENTS,
    COMPUTE,
    DELTA,
    DELTAS,
    FEATURE,
    FEATURES,
    FORECAST,
    GROUPS,
    GUIDANCE,
    GUIDE,
    HISTORY_STEPS,
    NEGATIVE,
    POSITIVE,
    PROLOGUE,
    SIGMAS,
    STEP,
    VELOCITIES,
    VELOCITY,
    history_name,
    history_window,
    hoisted_name,
    timesteps_of,
)
from cachec.runtime.specs import Dim, Signature, TensorSpec

NUM_SLOTS, NUM_STEPS = 3, 4  # sizes of the example's symbolic axes; at least two, or the axis would not stay symbolic


@dataclass(frozen=True, eq=False)
class EnginePlan:
    """One engine to build: its program, the graph that this was made from, and its signature."""

    name: str
    program: ExportedProgram
    signature: Signature
    graph: fx.GraphModule


def plan_engines(graphs: Graphs, inputs: Mapping[str, torch.Tensor], latents: str, num_steps: int) -> list[EnginePlan]:
    """Plans for all engines; ``inputs`` are example inputs of the model, ``latents`` the name of one.

    Raises:
        PassError: a graph cannot be exported.
    """
    device = inputs[latents].device
    each = torch.full((len(inputs[latents]),), -0.1, device=device)
    known = {**inputs, DELTA: each, CARRY: each + 1}
    plans = []
    if PROLOGUE in graphs.modules:
        prologue = graphs.modules[PROLOGUE]
        told = [timesteps_of(graph, second=second) for graph in graphs.modules for second in (False, True)]
        times = {name: torch.linspace(1, 0.1, NUM_STEPS, device=device) for name in told}
        given = {name: {**inputs, **times}[name] for name in placeholders(prologue)}
        plans.append(plan_engine(PROLOGUE, prologue, given, graphs.axes))
        hoisted = {name: _example(value, device) for name, value in _results(prologue, plans[-1].program).items()}
    else:
        hoisted = {}
    for owner in compute_graphs(graphs):
        given = known | _single(graphs, owner, hoisted)
        plans.append(plan_engine(owner, graphs.modules[owner], given, graphs.axes))
    compute = graphs.modules[COMPUTE]
    if FORECAST in graphs.modules:
        feature = outputs(compute)[FEATURE].meta["val"]
        shape = [len(inputs[latents]), *map(int, feature.shape[1:])]
        example = torch.randn(shape).to(device, feature.dtype)
        some = _forecast_inputs(graphs, inputs, example, hoisted, num_steps)
        plans.append(plan_engine(FORECAST, graphs.modules[FORECAST], some, graphs.axes))
    if ADVANCE in graphs.modules:
        velocity = torch.zeros_like(inputs[latents]).to(outputs(compute)[VELOCITY].meta["val"].dtype)
        velocities = torch.stack([velocity + i for i in range(NUM_SLOTS)])
        row = torch.linspace(1, 0.5, NUM_SLOTS, device=device)[None]
        share = torch.full((1,), 0.5, device=device)
        some = {BASE: inputs[latents], VELOCITIES: velocities, COEFFICIENTS: row, BASE_SHARE: share}
        plans.append(plan_engine(ADVANCE, graphs.modules[ADVANCE], some, graphs.axes))
    if GUIDE in graphs.modules:
        branch = torch.zeros_like(inputs[latents], dtype=torch.float32)
        plans.append(
            plan_engine(GUIDE, graphs.modules[GUIDE], {NEGATIVE: branch, POSITIVE: branch + 1, GUIDANCE: each + 2}, {})
        )
    return plans


def plan_engine(
    name: str, module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> EnginePlan:
    """Export one graph; ``inputs`` are example values of its inputs, in any order, among others."""
    known = axes.get(name, {})
    ordered = {key: inputs[key] for key in placeholders(module)}
    program = export_program(module, ordered, {key: known.get(key, (BATCH,)) for key in ordered})
    given = tuple(_spec(key, value, known.get(key, (BATCH,))) for key, value in ordered.items())
    made = tuple(_spec(key, value, known.get(key, (BATCH,))) for key, value in _results(module, program).items())
    return EnginePlan(name, program, Signature(given, made), module)


def _results(module: fx.GraphModule, program: ExportedProgram) -> dict[str, torch.Tensor]:
    """What the program of a graph gives, by name: shapes and types."""
    made_by = {node.name: node for node in program.graph.nodes}
    names = zip(outputs(module), program.graph_signature.user_outputs, strict=True)
    return {key: made_by[str(node)].meta["val"] for key, node in names}


def _example(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Some numbers of the same shape, at the sizes of the examples."""
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]  # int() would fix them
    return torch.randn(sizes, device=device).to(value.dtype)


def _single(graphs: Graphs, owner: str, hoisted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the prologue made for one step of a graph, by the graph's names."""
    found = {}
    for name in placeholders(graphs.modules[owner]):
        if (label := hoisted_name(owner, name)) in hoisted:
            found[name] = hoisted[label][0] if len(graphs.axes[PROLOGUE][label]) > 1 else hoisted[label]
    return found


def _forecast_inputs(
    graphs: Graphs,
    inputs: Mapping[str, torch.Tensor],
    feature: torch.Tensor,
    hoisted: Mapping[str, torch.Tensor],
    num_steps: int,
) -> dict[str, torch.Tensor]:
    module, axes = graphs.modules[FORECAST], graphs.axes[FORECAST]
    names = placeholders(module)
    window = history_window(names)
    examples = {
        **inputs,
        FEATURES: torch.stack([feature + i for i in range(NUM_SLOTS)]),
        **_numbers(graphs.groups, len(feature)),
        DELTA: torch.full(feature.shape[:1], -0.1),
        DELTAS: torch.linspace(-0.1, -0.2, NUM_STEPS),
        CARRY: torch.full(feature.shape[:1] if axes.get(CARRY, (BATCH,)) else (1,), 0.9),  # of samples, or of a whole run
        SIGMAS: torch.linspace(1, 0, num_steps + 1),
        STEP: torch.tensor(min(3, num_steps - 1)),
        HISTORY_STEPS: torch.arange(window, 0, -1),
        **{history_name(i): feature + i for i in range(window)},
    }
    result = {}
    for name in names:
        label = hoisted_name(FORECAST, name)
        by_step = len(axes.get(name, (BATCH,))) > 1
        if label in hoisted:
            stepwise = len(graphs.axes[PROLOGUE][label]) > 1
            result[name] = hoisted[label][0] if stepwise and not by_step else hoisted[label]
        elif name in inputs and by_step:  # timesteps, of all steps
            result[name] = torch.stack([inputs[name]] * NUM_STEPS)
        else:
            result[name] = examples[name].to(feature.device)
    return result


def _numbers(groups: Groups, batch: int) -> dict[str, torch.Tensor]:
    """Rows and biases of some steps."""
    rows, bias = torch.linspace(1, 0.5, NUM_SLOTS), torch.linspace(0, 0.5, NUM_STEPS)
    if groups.by_row:
        return {COEFFICIENTS: rows.repeat(NUM_STEPS, batch, 1), BIAS: bias[:, None].repeat(1, batch)}
    return {COEFFICIENTS: rows.repeat(NUM_STEPS, groups.count, 1), BIAS: bias}


def _spec(name: str, value: torch.Tensor, axes: tuple[str, ...]) -> TensorSpec:
    named = tuple(int(size) if axis == GROUPS else axis for axis, size in zip(axes, value.shape, strict=False))
    dims: tuple[Dim, ...] = (*named, *map(int, value.shape[len(axes) :]))
    return TensorSpec(name, dims, str(value.dtype).removeprefix("torch."))
