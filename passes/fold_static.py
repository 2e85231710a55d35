"""Evaluate ahead of time the part of the predictor that depends only on the schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import (
    Graphs,
    Pass,
    PassResult,
    PredictorRows,
    backward_slice,
    emit,
    fetch,
    finish,
    outputs,
    placeholders,
)
from cachec.runtime.abi import (
    BATCH,
    BIAS,
    COEFFICIENTS,
    FEATURE,
    FEATURES,
    FORECAST,
    GROUPS,
    HISTORY_STEPS,
    SIGMAS,
    SLOTS,
    STEP,
    VELOCITY,
    history_name,
)
from cachec.runtime.errors import PassError, PredictorError

SCHEDULE_INPUTS = (SIGMAS, STEP, HISTORY_STEPS)
PROBE_SCALES = (1.0, 1e4)  # of the random features: a predictor may be linear near zero only
PROBE_TOKENS = 16
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class FoldStatic(Pass):
    """Binding-time analysis of the inlined predictor.

    Nodes that depend on the schedule and on weights only are *static*: they are run once per step of ``histories`` (step
    → which steps its history is of, newest first). Nodes that touch a feature are *dynamic*. If the dynamic part is an
    affine combination of the features, the same for every element — probed in float64 at every step, not assumed — then
    the predictor is replaced by ``coefficients @ features + bias``, and the numbers are returned as rows.

    Raises ``PredictorError`` for a predictor that is not such a combination.
    """

    name: ClassVar[str] = "fold_static"
    sigmas: torch.Tensor
    histories: Mapping[int, tuple[int, ...]]

    def requires(self, graphs: Graphs) -> None:
        if history_name(0) not in placeholders(graphs.modules[FORECAST]):
            raise PassError("the forecast graph has no predictor inlined; run inline_predictor first")

    def run(self, graphs: Graphs) -> PassResult:
        module = graphs.modules[FORECAST]
        analysis = analyse(module)
        num_steps = len(self.sigmas) - 1
        coefficients = torch.zeros(num_steps, len(analysis.history), dtype=torch.float64)
        bias = torch.zeros(num_steps, dtype=torch.float64)
        for step, history in self.histories.items():
            schedule = {SIGMAS: self.sigmas, STEP: torch.tensor(step), HISTORY_STEPS: torch.tensor(history)}
            known = evaluate_static(module, analysis, schedule)
            coefficients[step], bias[step] = probe(module, analysis, known, step)
        new, feature = _linear_forecast(module, analysis)
        rows, modules = PredictorRows(coefficients, bias), {**graphs.modules, FORECAST: new}
        axes = {**graphs.axes, FORECAST: {FEATURES: (SLOTS, BATCH), COEFFICIENTS: (GROUPS, SLOTS), BIAS: ()}}
        return PassResult(replace(graphs, modules=modules, cut=feature, rows=rows, axes=axes), changed=True)

    def ensures(self, graphs: Graphs) -> None:
        left = placeholders(graphs.modules[FORECAST]).keys() & set(SCHEDULE_INPUTS)
        if left:
            raise PassError(f"the folded graph still reads {sorted(left)}")


@dataclass(frozen=True, eq=False)
class Analysis:
    """Binding times in the predictor: its history inputs, static nodes and dynamic nodes, in order; and its result."""

    history: list[fx.Node]
    static: list[fx.Node]
    dynamic: list[fx.Node]
    result: fx.Node


def analyse(module: fx.GraphModule) -> Analysis:
    """Split the nodes that lead to the predicted feature by what they depend on."""
    inputs = placeholders(module)
    history: list[fx.Node] = []
    while history_name(len(history)) in inputs:
        history.append(inputs[history_name(len(history))])
    result = outputs(module)[FEATURE]
    needed = backward_slice([result])
    touched, static, dynamic = set(history), [], []
    for node in module.graph.nodes:
        if node not in needed or node in touched:
            continue
        if any(argument in touched for argument in node.all_input_nodes):
            touched.add(node)
            dynamic.append(node)
        else:
            static.append(node)
    return Analysis(history, static, dynamic, result)


@torch.no_grad()
def evaluate_static(module: fx.GraphModule, analysis: Analysis, schedule: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
    """Values of the static nodes under one step's ``schedule``."""
    values: dict[fx.Node, Any] = {}
    for node in analysis.static:
        if node.op == "placeholder":
            values[node] = schedule[str(node.target)]
        elif node.op == "get_attr":
            values[node] = fetch(module, str(node.target))
        else:
            values[node] = _call(node, values)
    return values


@torch.no_grad()
def probe(module: fx.GraphModule, analysis: Analysis, known: Mapping[fx.Node, Any], step: int) -> tuple[torch.Tensor, float]:
    """Coefficients [W] and bias of the dynamic part, and the check that it has no more to it.

    Raises:
        PredictorError: the dynamic part is not an affine combination with the same numbers for every element.
    """
    double = {node: _double(value) for node, value in known.items()}
    _, tokens, *channels = analysis.history[0].meta["val"].shape
    shape = (1, min(int(tokens), PROBE_TOKENS), *map(int, channels))
    size = len(analysis.history)

    def predict(features: list[torch.Tensor]) -> torch.Tensor:
        values = {**double, **dict(zip(analysis.history, features, strict=True))}
        try:
            for node in analysis.dynamic:
                values[node] = _double(_call(node, values))
        except RuntimeError as error:  # a weight for each token, say
            raise PredictorError(f"the predictor cannot be folded ({error}): compile with --fold none") from error
        result: torch.Tensor = values[analysis.result]
        return result

    zeros = [torch.zeros(shape, dtype=torch.float64) for _ in range(size)]
    offset = predict(zeros)
    bias = offset.mean().item()
    row = torch.zeros(size, dtype=torch.float64)
    for index in range(size):
        one = [*zeros[:index], torch.ones_like(zeros[0]), *zeros[index + 1 :]]
        row[index] = (predict(one) - offset).mean()
    generator = torch.Generator().manual_seed(step)
    for scale in PROBE_SCALES:
        features = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(size)]
        expected = torch.einsum("w,w...->...", row, torch.stack(features)) + bias
        error = (predict(features) - expected).abs().max().item() / (scale * max(1.0, row.abs().sum().item()))
        if not error <= TOLERANCE:
            raise PredictorError(
                f"the predictor is not linear in the features: at step {step} it is off by {error:.1e} from any affine "
                "combination of them with the same weights for every element. Compile with --fold none, which keeps it in "
                "the engine"
            )
    return row, bias


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _linear_forecast(module: fx.GraphModule, analysis: Analysis) -> tuple[fx.GraphModule, str]:
    """The tail behind ``coefficients @ features + bias``, accumulated in float32; and the name of that sum's node."""
    graph = fx.Graph()
    example = analysis.result.meta["val"]
    size = len(analysis.history)
    features = _placeholder(graph, FEATURES, example.new_empty((size, *example.shape)))
    coefficients = _placeholder(graph, COEFFICIENTS, example.new_empty((1, size), dtype=torch.float32))
    bias = _placeholder(graph, BIAS, example.new_empty((), dtype=torch.float32))
    aten = torch.ops.aten
    wide = features if example.dtype == torch.float32 else emit(features, aten.to.dtype, features, torch.float32)
    row = emit(features, aten.squeeze.dim, coefficients, 0)
    summed = emit(features, aten.tensordot.default, row, wide, [0], [0])
    feature = emit(features, aten.add.Tensor, summed, bias)
    if example.dtype != torch.float32:
        feature = emit(features, aten.to.dtype, feature, example.dtype)
    unread = [node for name, node in placeholders(module).items() if name in SCHEDULE_INPUTS]
    predictor = {*analysis.history, *analysis.static, *analysis.dynamic, *unread}
    values: dict[fx.Node, fx.Node] = {analysis.result: feature}
    attributes = {}
    velocity = outputs(module)[VELOCITY]
    for node in module.graph.nodes:
        tail_weight = node.op == "get_attr" and any(user not in predictor for user in node.users)
        if node.op == "output" or (node in predictor and not tail_weight):
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = dict(node.meta)
        if node.op == "get_attr":
            attributes[str(node.target)] = fetch(module, str(node.target))
    graph.output({VELOCITY: values[velocity]})
    new = fx.GraphModule(attributes, graph)
    finish(new)
    return new, feature.name


def _placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta = {"val": example}
    return node
