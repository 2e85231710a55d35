"""Is what a graph computes finite? In a low precision large models leave its range, and pictures turn black."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cachec.compiler.graphs.costs import run_costs
from cachec.compiler.graphs.weights import Values
from cachec.passes import Graphs
from cachec.runtime.abi import COMPUTE, FEATURE
from cachec.runtime.errors import EngineError

log = logging.getLogger(__name__)


MAX_BYTES, MAX_FLOPS = 2 << 30, 1e12  # of weights, and for one sample: seconds on a CPU


def check_finite_run(graphs: Graphs, inputs: Mapping[str, torch.Tensor], precision: str, slots: str | None = None) -> None:
    """Run the compute graph on example ``inputs``; features must also be finite in the type ``slots`` that they are kept in.

    Of a large model it is said that this is left out: it would take minutes and the whole model in memory.

    Raises:
        EngineError: something is NaN or infinite; says in which precision, and where first.
    """
    size, flops = run_costs(graphs.modules[COMPUTE])
    if size > MAX_BYTES or flops > MAX_FLOPS:
        log.warning(
            "whether the model stays finite in %s was not tried, with %.1f GB of weights and %.1f TFLOP a sample: if the first "
            "picture is black, compile with --dtype bfloat16 or float32",
            *(precision, size / 1e9, flops / 1e12),
        )
        return
    compute = Values(next(iter(inputs.values())).device).module(graphs.modules[COMPUTE])
    with torch.no_grad():
        results = compute(**inputs)
    if not all(map(_is_finite, results.values())):
        finder = _Finder(compute)
        with torch.no_grad():
            finder.run(*(inputs[str(node.target)] for node in compute.graph.nodes if node.op == "placeholder"))
        wider = "" if precision == "float32" else "take --dtype float32 or bfloat16, which have a larger range, or "
        raise EngineError(
            f"in {precision} an example run of the model is not finite, first at {finder.first}: {wider}check the weights"
        )
    if slots is not None and FEATURE in results and not _is_finite(results[FEATURE].to(getattr(torch, slots))):
        largest = results[FEATURE].abs().max().item()
        raise EngineError(
            f"features of an example run reach {largest:.3g}, which is out of the range of {slots}: leave --slots out, or take "
            "--slots bfloat16"
        )


class _Finder(fx.Interpreter):
    """Runs a graph node by node, and keeps the first place where something is not finite."""

    first = "its output"

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._found = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if not self._found and n.op == "call_function" and isinstance(result, torch.Tensor) and not _is_finite(result):
            self._found, self.first = True, place_of(n)
        return result


def place_of(node: fx.Node) -> str:
    """A node as people find it: its name, its operator, and where in the model that is."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([path for path, _ in stack.values()]), "") if stack else ""
    return f"{node.name} ({node.target}{f' in {path}' if path else ''})"


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
