"""The graph of the output cut: a share of a base plus weighted velocities."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, finish, outputs
from cachec.runtime.abi import (
    ADVANCE,
    BASE,
    BASE_SHARE,
    BATCH,
    COEFFICIENTS,
    COMPUTE,
    GROUPS,
    NEXT_LATENTS,
    SLOTS,
    VELOCITIES,
    VELOCITY,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class AddAdvance(Pass):
    """Add the graph ``next_latents = base_share * base + coefficients @ velocities``.

    base [B, …], its share [1], velocities [H, B, …], coefficients [G, H] with one group: a row.
    """

    name: ClassVar[str] = "add_advance"

    def run(self, graphs: Graphs) -> PassResult:
        graph = fx.Graph()
        names = (BASE, VELOCITIES, COEFFICIENTS, BASE_SHARE)
        base, velocities, coefficients, share = (graph.placeholder(name) for name in names)
        slots = graph.call_function(aten.sym_size.int, (velocities, 0))
        flat = graph.call_function(aten.view.default, (velocities, [slots, -1]))
        rest = [int(size) for size in outputs(graphs.modules[COMPUTE])[VELOCITY].meta["val"].shape[1:]]
        summed = graph.call_function(aten.mm.default, (coefficients, flat))
        moved = graph.call_function(aten.view.default, (summed, [-1, *rest]))
        start = graph.call_function(aten.mul.Tensor, (base, share))
        graph.output({NEXT_LATENTS: graph.call_function(aten.add.Tensor, (start, moved))})
        module = fx.GraphModule(torch.nn.Module(), graph)
        finish(module)
        axes = {**graphs.axes, ADVANCE: {VELOCITIES: (SLOTS, BATCH), COEFFICIENTS: (GROUPS, SLOTS), BASE_SHARE: ()}}
        return PassResult(replace(graphs, modules={**graphs.modules, ADVANCE: module}, axes=axes), changed=True)
