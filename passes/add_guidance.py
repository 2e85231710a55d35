"""The graph that combines the two branches of classifier-free guidance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, finish, outputs
from cachec.runtime.abi import COMPUTE, GUIDANCE, GUIDE, NEGATIVE, POSITIVE, VELOCITY
from cachec.runtime.errors import PassError

aten = torch.ops.aten
Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class AddGuidance(Pass):
    """Add the graph that makes one velocity of the ``negative`` and ``positive`` branches' [B, …] at ``guidance_scale`` [B].

    ``rule`` is the family's own (``RULES``). Both branches are rows of one batch in all other graphs, which do not know it.
    """

    name: ClassVar[str] = "add_guidance"
    rule: str

    def requires(self, graphs: Graphs) -> None:
        if self.rule not in RULES:
            raise PassError(f"there is no rule of guidance {self.rule!r}; known are {', '.join(RULES)}")

    def run(self, graphs: Graphs) -> PassResult:
        ndim = outputs(graphs.modules[COMPUTE])[VELOCITY].meta["val"].ndim
        return PassResult(replace(graphs, modules={**graphs.modules, GUIDE: guidance_graph(self.rule, ndim)}), changed=True)


def guidance_graph(rule: str, ndim: int) -> fx.GraphModule:
    """The graph of a rule for velocities with ``ndim`` axes."""
    graph = fx.Graph()
    negative, positive, scale = (graph.placeholder(name) for name in (NEGATIVE, POSITIVE, GUIDANCE))

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call_function(op, args)

    each = call(aten.view.default, scale, [-1, *[1] * (ndim - 1)])
    graph.output({VELOCITY: RULES[rule](call, negative, positive, each)})
    module = fx.GraphModule(torch.nn.Module(), graph)
    finish(module)
    return module


def _plain(call: Call, negative: fx.Node, positive: fx.Node, scale: fx.Node) -> fx.Node:
    """Negative + scale (positive - negative): Ho and Salimans, arXiv 2207.12598, as diffusers has it."""
    apart = call(aten.sub.Tensor, positive, negative)
    return call(aten.add.Tensor, negative, call(aten.mul.Tensor, scale, apart))


def _extra(call: Call, negative: fx.Node, positive: fx.Node, scale: fx.Node) -> fx.Node:
    """Positive + scale (positive - negative): the same with a scale that is smaller by 1 (Z-Image)."""
    apart = call(aten.sub.Tensor, positive, negative)
    return call(aten.add.Tensor, positive, call(aten.mul.Tensor, scale, apart))


def _renormalised(call: Call, negative: fx.Node, positive: fx.Node, scale: fx.Node) -> fx.Node:
    """The plain rule, as long in every token as the positive branch (Qwen-Image)."""
    combined = _plain(call, negative, positive, scale)

    def length(value: fx.Node) -> fx.Node:
        return call(aten.sqrt.default, call(aten.sum.dim_IntList, call(aten.mul.Tensor, value, value), [-1], True))

    return call(aten.mul.Tensor, combined, call(aten.div.Tensor, length(positive), length(combined)))


RULES: Mapping[str, Callable[[Call, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "plain": _plain,
    "extra": _extra,
    "renormalised": _renormalised,
}
