"""The sampler's Euler step, inside the engines."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, emit, finish, outputs, placeholders, writable
from cachec.runtime.abi import DELTA, NEXT_LATENTS, PROLOGUE, VELOCITY

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSampler(Pass):
    """Add ``next_latents = latents + delta * velocity`` to each graph that gives one velocity.

    ``delta`` [B] is each sample's step in sigma. The velocity stays a result: another sampler may want it.
    """

    name: ClassVar[str] = "fuse_sampler"
    latents: str

    def run(self, graphs: Graphs) -> PassResult:
        modules = dict(graphs.modules)
        for name, module in graphs.modules.items():
            if name != PROLOGUE and VELOCITY in outputs(module):
                modules[name] = _fused(writable(graphs, name)[0], self.latents)
        return PassResult(replace(graphs, modules=modules), changed=True)


def _fused(module: fx.GraphModule, name: str) -> fx.GraphModule:
    graph, results = module.graph, outputs(module)
    velocity, names = results[VELOCITY], placeholders(module)
    with graph.inserting_before(next(iter(graph.nodes))):
        delta = graph.placeholder(DELTA)
        latents = names.get(name) or graph.placeholder(name)
    example = velocity.meta["val"]
    delta.meta = {"val": example.new_empty(example.shape[:1])}
    latents.meta.setdefault("val", velocity.meta["val"])
    end = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(end):
        each = emit(delta, aten.view.default, delta, [-1, *[1] * (example.ndim - 1)])
        moved = graph.call_function(aten.mul.Tensor, (velocity, each))
        after = graph.call_function(aten.add.Tensor, (latents, moved))
    for node in (moved, after):
        node.meta = dict(velocity.meta)
    end.args = ({**results, NEXT_LATENTS: after},)
    finish(module)
    return module
