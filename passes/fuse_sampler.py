"""The sampler's Euler step, inside the engines."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, emit, finish, outputs, placeholders, writable
from cachec.runtime.abi import CARRY, DELTA, NEXT_LATENTS, PROLOGUE, VELOCITY

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSampler(Pass):
    """Add ``next_latents = latents + delta * velocity`` to each graph that gives one velocity.

    ``delta`` [B] is each sample's step in sigma. ``carries``: the sampler is of Euler's kind, but no flow's, and keeps
    ``carry`` [B] of the latents. The velocity stays a result: another sampler may want it.
    """

    name: ClassVar[str] = "fuse_sampler"
    latents: str
    carries: bool = False

    def run(self, graphs: Graphs) -> PassResult:
        modules = dict(graphs.modules)
        for name, module in graphs.modules.items():
            if name != PROLOGUE and VELOCITY in outputs(module):
                modules[name] = _fused(writable(graphs, name)[0], self.latents, carries=self.carries)
        return PassResult(replace(graphs, modules=modules), changed=True)


def _fused(module: fx.GraphModule, name: str, *, carries: bool) -> fx.GraphModule:
    graph, results = module.graph, outputs(module)
    velocity, names = results[VELOCITY], placeholders(module)
    with graph.inserting_before(next(iter(graph.nodes))):
        delta, *carry = (graph.placeholder(label) for label in ((DELTA, CARRY) if carries else (DELTA,)))
        latents = names.get(name) or graph.placeholder(name)
    example = velocity.meta["val"]
    for number in (delta, *carry):
        number.meta = {"val": example.new_empty(example.shape[:1])}
    latents.meta.setdefault("val", velocity.meta["val"])
    end = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(end):
        each, *kept = (emit(one, aten.view.default, one, [-1, *[1] * (example.ndim - 1)]) for one in (delta, *carry))
        moved = graph.call_function(aten.mul.Tensor, (velocity, each))
        start = graph.call_function(aten.mul.Tensor, (latents, *kept)) if kept else latents
        after = graph.call_function(aten.add.Tensor, (start, moved))
    for node in (moved, after, *([start] if kept else [])):
        node.meta = dict(velocity.meta)
    end.args = ({**results, NEXT_LATENTS: after},)
    finish(module)
    return module
