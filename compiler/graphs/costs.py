"""What graphs cost, read off their shapes: what hoisting took out of the step, and memory before anything runs.

All figures are for a batch of one.
"""

import torch
from torch import fx

from cachec.passes import Graphs
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE

LINEAR = torch.ops.aten.linear.default


def hoisting_facts(before: Graphs, after: Graphs) -> dict[str, dict[str, int]]:
    """By step graph: nodes, FLOPs of linear layers, and bytes of weights that left it. Empty without a prologue."""
    if PROLOGUE not in after.modules:
        return {}
    facts = {}
    for name in (COMPUTE, FORECAST):
        if name in after.modules:
            old, new = (_costs(graphs.modules[name]) for graphs in (before, after))
            facts[name] = {key: old[key] - new[key] for key in old}
    return facts


def run_costs(module: fx.GraphModule) -> tuple[int, int]:
    """Bytes of weights, and FLOPs of linear layers of one run."""
    found = _costs(module)
    return found["weight_bytes"], found["flops"]


def memory_facts(graphs: Graphs) -> dict[str, int]:
    """Bytes: of all weights, and the most activations of the compute graph that are alive at once.

    The latter counts every value from its making to its last reading, views as if they were copies: a bound from above for
    an engine that fuses nothing.
    """
    weights: dict[int, int] = {}
    for module in graphs.modules.values():
        weights |= {id(tensor): _bytes(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return {"weights": sum(weights.values()), "activations": _peak(graphs.modules[COMPUTE])}


def _costs(module: fx.GraphModule) -> dict[str, int]:
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    flops = sum(_linear_flops(node) for node in nodes if node.target is LINEAR)
    return {
        "nodes": len(nodes),
        "flops": flops,
        "weight_bytes": sum(map(_bytes, {id(t): t for t in (*module.parameters(), *module.buffers())}.values())),
    }


def _linear_flops(node: fx.Node) -> int:
    """2 x in x out for each row of a linear layer."""
    value, given = node.meta.get("val"), node.args[0]
    if not isinstance(value, torch.Tensor) or not isinstance(given, fx.Node):
        return 0
    rows = _numel(value) // int(value.shape[-1])
    return 2 * rows * int(value.shape[-1]) * int(given.meta["val"].shape[-1])


def _peak(module: fx.GraphModule) -> int:
    last: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for value in node.all_input_nodes:
            last[value] = node
    ends = {node: [value for value, reader in last.items() if reader is node] for node in set(last.values())}
    kept = set(outputs(module).values())
    alive = peak = sum(_value_bytes(node) for node in placeholders(module).values())
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        alive += _value_bytes(node)
        peak = max(peak, alive)
        alive -= sum(_value_bytes(value) for value in ends.get(node, []) if value.op == "call_function" and value not in kept)
    return peak


def _value_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return _numel(value) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _numel(value: torch.Tensor) -> int:
    """Elements for a batch of one."""
    total = 1
    for size in value.shape:
        total *= 1 if isinstance(size, torch.SymInt) else int(size)
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
