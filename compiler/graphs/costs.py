"""What graphs cost, read off their shapes: what hoisting took out of the step, and memory before anything runs.

All figures are for a batch of one.
"""

import math
from collections.abc import Hashable, Iterable

import torch
from torch import fx

from cachec.compiler.graphs.flops import run_flops, sizes_of
from cachec.compiler.graphs.weights import expression, is_named
from cachec.passes import Graphs
from cachec.passes.base import compute_graphs, outputs, placeholders
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, PROLOGUE, hoisted_name, steps_of

MAX_FEATURE = 256 << 20  # bytes in float32; activations take some ten times as much


def hoisting_facts(before: Graphs, after: Graphs) -> dict[str, dict[str, int]]:
    """By step graph: nodes, FLOPs, and bytes of weights that left it. Empty without a prologue."""
    if PROLOGUE not in after.modules:
        return {}
    facts = {}
    for name in (COMPUTE, FORECAST):
        if name in after.modules:
            old, new = (_costs(graphs.modules[name]) for graphs in (before, after))
            facts[name] = {key: old[key] - new[key] for key in old}
    return facts


def run_costs(module: fx.GraphModule) -> tuple[int, int]:
    """Bytes of weights, and FLOPs of one run."""
    found = _costs(module)
    return found["weight_bytes"], found["flops"]


def samples_at_once(split: Graphs) -> int:
    """How many samples of a split model are run at once: as many as have ``MAX_FEATURE`` bytes of features, at least one."""
    feature = outputs(split.modules[COMPUTE])[FEATURE].meta["val"]
    return int(max(1, MAX_FEATURE // (4 * math.prod(map(int, feature.shape[1:])))))


def memory_facts(graphs: Graphs) -> dict[str, int]:
    """Bytes: of all weights, and the most activations of the compute graph that are alive at once.

    The latter counts every value from its making to its last reading, views as if they were copies: a bound from above for
    an engine that fuses nothing.
    """
    return {"weights": _weight_bytes(graphs.modules.values()), "activations": _peak(graphs.modules[COMPUTE])}


def component_memory(module: fx.GraphModule) -> dict[str, int]:
    """The same of a graph that is run by itself."""
    return {"weights": _weight_bytes([module]), "activations": _peak(module)}


def _weight_bytes(modules: Iterable[fx.GraphModule]) -> int:
    held = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum({_what(tensor): _bytes(tensor) for tensor in held}.values())


def parameter_counts(plain: Graphs, engine: Graphs) -> dict[str, int]:
    """Parameters of the model's bodies and of a tail, from the graphs as they were split; ``hoisted``: held by the prologue.

    The tail is what forecasts share with the model: with a predictor that has a head, that, too. ``predictor``: what they do
    not share.
    """
    wholes = [_parameters(plain.modules[name]) for name in compute_graphs(plain)]
    forecast = _parameters(plain.modules[FORECAST]) if FORECAST in plain.modules else {}
    known = {key for whole in wholes for key in whole}
    tail = {key: count for key, count in forecast.items() if key in known}
    body = sum(sum(whole.values()) for whole in wholes) - sum(tail.values())
    prologue = engine.modules.get(PROLOGUE)
    held = {} if prologue is None else {id(one): one.numel() for one in (*prologue.parameters(), *prologue.buffers())}
    own = sum(forecast.values()) - sum(tail.values())
    return {"body": body, "tail": sum(tail.values()), "predictor": own, "hoisted": sum(held.values())}


def step_value_bytes(graphs: Graphs, computed: int) -> int:
    """Bytes of what the prologue leaves for so many computed steps; the one modulation of a forecast is not counted."""
    axes = graphs.axes.get(PROLOGUE, {})
    labels = {hoisted_name(COMPUTE, name): node for name, node in placeholders(graphs.modules[COMPUTE]).items()}
    return sum(
        output_bytes(node) * (computed if steps_of(COMPUTE) in axes[label] else 1)
        for label, node in labels.items()
        if label in axes
    )


def output_bytes(node: fx.Node) -> int:
    """Bytes of a node's value."""
    value = node.meta.get("val")
    return math.prod(sizes_of(value)) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _parameters(module: fx.GraphModule) -> dict[Hashable, int]:
    """Numbers of elements, by what is the same for equal ones."""
    return {_what(one): one.numel() for one in module.parameters()}


def _what(tensor: torch.Tensor) -> Hashable:
    """The same for tensors that are one in a weights file."""
    return expression(tensor).key if is_named(tensor) else id(tensor)


def _costs(module: fx.GraphModule) -> dict[str, int]:
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return {
        "nodes": len(nodes),
        "flops": run_flops(module),
        "weight_bytes": sum(map(_bytes, {id(t): t for t in (*module.parameters(), *module.buffers())}.values())),
    }


def _peak(module: fx.GraphModule) -> int:
    last: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for value in node.all_input_nodes:
            last[value] = node
    ends = {node: [value for value, reader in last.items() if reader is node] for node in set(last.values())}
    kept = set(outputs(module).values())
    alive = peak = sum(output_bytes(node) for node in placeholders(module).values())
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        alive += output_bytes(node)
        peak = max(peak, alive)
        alive -= sum(output_bytes(value) for value in ends.get(node, []) if value.op == "call_function" and value not in kept)
    return peak


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
