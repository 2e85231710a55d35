"""All forecasts between two computed steps in one call."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import (
    CAST,
    Equivalence,
    Graphs,
    Groups,
    Pass,
    PassResult,
    backward_slice,
    fetch,
    finish,
    outputs,
    placeholders,
)
from cachec.runtime.abi import (
    BATCH,
    BIAS,
    CARRY,
    COEFFICIENTS,
    DELTAS,
    FEATURES,
    FORECAST,
    FORECASTS,
    NEXT_LATENTS,
    PROLOGUE,
    SLOTS,
    TARGET_TIMESTEP,
    VELOCITIES,
    VELOCITY,
    hoisted_name,
)
from cachec.runtime.errors import PassError

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchForecast(Pass):
    """From one step's forecast to ``n`` of them, with the sampler's Euler steps behind.

    No forecast depends on the latents, so all are one product ``coefficients @ features`` (of each group), and one tail on
    ``n * B`` samples. ``coefficients`` becomes [n, G, H], ``bias`` [n] (of each row [n, B, H] and [n, B]); what differs from
    step to step (``timestep``, hoisted values) gets an axis of steps in front; latents [B, …] and ``deltas`` [n] come in, and
    ``next_latents`` [B, …] goes out.

    ``carries``: the sampler keeps ``carry`` [1] of the latents over the run, and ``deltas`` say what each velocity is worth
    at its end. With ``velocities``, those [n, B, …] go out as well, for a sampler outside. Without, nobody reads the single
    ones: the weighted sum over the steps is taken in front of the last linear layer, which then runs once. (Not in half
    precision, where a cast to float32 comes last.)
    """

    name: ClassVar[str] = "batch_forecast"
    equivalence: ClassVar[Equivalence] = Equivalence.ROUNDING
    latents: str
    timestep: str
    velocities: bool = False
    carries: bool = False

    def requires(self, graphs: Graphs) -> None:
        if FEATURES not in placeholders(graphs.modules[FORECAST]) or graphs.cut is None:
            raise PassError("the forecast graph is not linear; run add_linear_forecast first")

    def run(self, graphs: Graphs) -> PassResult:
        module = graphs.modules[FORECAST]
        assert graphs.cut is not None  # as requires() has checked
        hoisted = graphs.axes.get(PROLOGUE, {})
        told = (self.timestep, TARGET_TIMESTEP)
        per_step = [n for n in placeholders(module) if n in told or len(hoisted.get(hoisted_name(FORECAST, n), ())) > 1]
        new = _batched(module, graphs.cut, self, per_step, graphs.groups)
        axes = {
            FEATURES: (SLOTS, BATCH),
            **{name: (FORECASTS, *graphs.axes[FORECAST][name]) for name in (COEFFICIENTS, BIAS)},
            DELTAS: (FORECASTS,),
            **({CARRY: ()} if self.carries else {}),
            **({VELOCITIES: (FORECASTS, BATCH)} if self.velocities else {}),
            **dict.fromkeys(per_step, (FORECASTS, BATCH)),
        }
        return PassResult(
            replace(graphs, modules={**graphs.modules, FORECAST: new}, axes={**graphs.axes, FORECAST: axes}), changed=True
        )


def _batched(module: fx.GraphModule, cut: str, wanted: BatchForecast, per_step: list[str], groups: Groups) -> fx.GraphModule:
    latents = wanted.latents
    feature = next(node for node in module.graph.nodes if node.name == cut)
    velocity = outputs(module)[VELOCITY]
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in (FEATURES, COEFFICIENTS, BIAS, latents, DELTAS)}
    inputs |= {CARRY: graph.placeholder(CARRY)} if wanted.carries else {}
    tail = backward_slice([velocity], {feature})
    inputs |= {name: graph.placeholder(name) for name, node in placeholders(module).items() if node in tail}
    call = graph.call_function
    steps = call(aten.sym_size.int, (inputs[COEFFICIENTS], 0))
    dtype = feature.meta["val"].dtype
    parts = _weighted(graph, inputs, groups, feature.meta["val"])
    forecast = parts[0] if len(parts) == 1 else call(aten.cat.default, (parts, groups.axis))  # [n * B, …]
    forecast = forecast if dtype == torch.float32 else call(CAST, (forecast,), {"dtype": dtype})
    size = call(aten.sym_size.int, (forecast, 0))
    values: dict[fx.Node, fx.Node] = {feature: forecast}
    attributes = {}
    for node in module.graph.nodes:
        if node not in tail or node is feature:
            continue
        if node.op == "placeholder":
            rank = node.meta["val"].ndim
            values[node] = _for_all_steps(graph, inputs[str(node.target)], steps, rank, widen=str(node.target) not in per_step)
        elif node.target is aten.sym_size.int:
            values[node] = size
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {k: v for k, v in node.meta.items() if k != "val"}
        if node.op == "get_attr":
            attributes[str(node.target)] = fetch(module, str(node.target))
    move = _summed(graph, values, velocity, inputs[DELTAS], steps, through=not wanted.velocities)
    start = call(aten.mul.Tensor, (inputs[latents], inputs[CARRY])) if wanted.carries else inputs[latents]
    result = {NEXT_LATENTS: call(aten.add.Tensor, (start, move))}
    if wanted.velocities:
        rest = [int(size) for size in velocity.meta["val"].shape[1:]]
        result[VELOCITIES] = call(aten.reshape.default, (values[velocity], [steps, -1, *rest]))
    graph.output(result)
    new = fx.GraphModule(attributes, graph)
    finish(new)
    return new


def _weighted(graph: fx.Graph, inputs: dict[str, fx.Node], groups: Groups, feature: torch.Tensor) -> list[fx.Node]:
    """All steps' sums over the slots, and their biases: a part [n * B, …] for each group."""
    call = graph.call_function
    if groups.by_row:
        return [_weighted_by_row(graph, inputs, feature)]
    slots = call(aten.sym_size.int, (inputs[FEATURES], 0))
    parts = []
    for number, shape in enumerate(groups.shapes([int(size) for size in feature.shape[1:]])):
        if groups.count == 1:
            flat = call(aten.view.default, (inputs[FEATURES], [slots, -1]))
            rows = call(aten.squeeze.dim, (inputs[COEFFICIENTS], 1))
        else:
            part = call(aten.slice.Tensor, (inputs[FEATURES], groups.axis + 1, *groups.part(number)))
            flat = call(aten.reshape.default, (part, [slots, -1]))
            rows = call(aten.select.int, (inputs[COEFFICIENTS], 1, number))
        flat = flat if feature.dtype == torch.float32 else call(CAST, (flat,), {"dtype": torch.float32})
        summed = call(aten.mm.default, (rows, flat))
        summed = call(aten.add.Tensor, (summed, call(aten.unsqueeze.default, (inputs[BIAS], 1))))
        parts.append(call(aten.view.default, (summed, [-1, *shape])))
    return parts


def _weighted_by_row(graph: fx.Graph, inputs: dict[str, fx.Node], feature: torch.Tensor) -> fx.Node:
    """The same where each row of the batch has weights of its own: a product for each row."""
    call = graph.call_function
    flat = call(aten.flatten.using_ints, (inputs[FEATURES], 2)) if feature.ndim > 2 else inputs[FEATURES]
    flat = flat if feature.dtype == torch.float32 else call(CAST, (flat,), {"dtype": torch.float32})
    features = call(aten.permute.default, (flat, [1, 0, 2]))  # [B, H, …]
    rows = call(aten.permute.default, (inputs[COEFFICIENTS], [1, 0, 2]))  # [B, n, H]
    summed = call(aten.permute.default, (call(aten.bmm.default, (rows, features)), [1, 0, 2]))
    summed = call(aten.add.Tensor, (summed, call(aten.unsqueeze.default, (inputs[BIAS], 2))))
    return call(aten.reshape.default, (summed, [-1, *(int(size) for size in feature.shape[1:])]))


def _summed(
    graph: fx.Graph, values: dict[fx.Node, fx.Node], node: fx.Node, deltas: fx.Node, steps: fx.Node, *, through: bool
) -> fx.Node:
    """The steps' values [n * B, …] of ``node``, weighted with ``deltas`` [n] and summed, [B, …].

    ``through`` linear layers: they are applied to what is summed already.
    """
    call = graph.call_function
    if through and node.target is aten.linear.default:
        given, weight, *bias = node.args
        assert isinstance(given, fx.Node)
        assert isinstance(weight, fx.Node)
        result = call(aten.linear.default, (_summed(graph, values, given, deltas, steps, through=through), values[weight]))
        if bias and isinstance(bias[0], fx.Node):
            weighted = call(aten.mul.Tensor, (values[bias[0]], call(aten.sum.default, (deltas,))))
            result = call(aten.add.Tensor, (result, weighted))
        return result
    rest = [int(size) for size in node.meta["val"].shape[1:]]
    flat = call(aten.reshape.default, (values[node], [steps, -1]))  # a part of channels lies with gaps
    moved = call(aten.mm.default, (call(aten.unsqueeze.default, (deltas, 0)), flat))
    return call(aten.view.default, (moved, [-1, *rest]))


def _for_all_steps(graph: fx.Graph, value: fx.Node, steps: fx.Node, rank: int, *, widen: bool) -> fx.Node:
    """[n, B, …] or, to ``widen``, [B, …] as [n * B, …]; ``rank`` is that of one step's."""
    if widen:
        value = graph.call_function(aten.unsqueeze.default, (value, 0))
        value = graph.call_function(aten.expand.default, (value, [steps, *[-1] * rank]))
    return graph.call_function(aten.flatten.using_ints, (value, 0, 1))
