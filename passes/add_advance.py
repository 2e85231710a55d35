"""The graph of the output cut: noise plus weighted velocities."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, finish, outputs
from cachec.runtime.abi import ADVANCE, BATCH, COEFFICIENTS, COMPUTE, NEXT_LATENTS, NOISE, SLOTS, VELOCITIES, VELOCITY

aten = torch.ops.aten


@dataclass(frozen=True)
class AddAdvance(Pass):
    """Add the graph ``next_latents = noise + coefficients @ velocities``; noise [B, …], one row [H], velocities [H, B, …]."""

    name: ClassVar[str] = "add_advance"

    def run(self, graphs: Graphs) -> PassResult:
        graph = fx.Graph()
        names = (NOISE, VELOCITIES, COEFFICIENTS)
        noise, velocities, coefficients = (graph.placeholder(name) for name in names)
        slots = graph.call_function(aten.sym_size.int, (velocities, 0))
        flat = graph.call_function(aten.view.default, (velocities, [slots, -1]))
        row = graph.call_function(aten.unsqueeze.default, (coefficients, 0))
        rest = [int(size) for size in outputs(graphs.modules[COMPUTE])[VELOCITY].meta["val"].shape[1:]]
        moved = graph.call_function(aten.view.default, (graph.call_function(aten.mm.default, (row, flat)), [-1, *rest]))
        graph.output({NEXT_LATENTS: graph.call_function(aten.add.Tensor, (noise, moved))})
        module = fx.GraphModule(torch.nn.Module(), graph)
        finish(module)
        axes = {**graphs.axes, ADVANCE: {VELOCITIES: (SLOTS, BATCH), COEFFICIENTS: (SLOTS,)}}
        return PassResult(replace(graphs, modules={**graphs.modules, ADVANCE: module}, axes=axes), changed=True)
