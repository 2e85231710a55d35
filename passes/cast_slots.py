"""Slots of a smaller type: features and velocities are stored in it, and read as what they were."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import (
    CAST,
    Equivalence,
    Graphs,
    Pass,
    PassResult,
    compute_graphs,
    emit,
    finish,
    outputs,
    placeholders,
    writable,
)
from cachec.runtime.abi import ADVANCE, COMPUTE, FEATURE, FEATURES, FORECAST, VELOCITIES, VELOCITY

aten = torch.ops.aten
HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class CastSlots(Pass):
    """Let computed steps leave ``dtype`` in the slots, and forecasts read it, each with a cast of their own.

    What is kept is the feature where there is a forecast graph, else the velocity. float16 holds up to 65,504: what is larger
    becomes that. All arithmetic stays as it was.
    """

    name: ClassVar[str] = "cast_slots"
    equivalence: ClassVar[Equivalence] = Equivalence.PRECISION
    dtype: torch.dtype

    def run(self, graphs: Graphs) -> PassResult:
        reader, kept = (FORECAST, FEATURE) if FORECAST in graphs.modules else (ADVANCE, VELOCITY)
        value = outputs(graphs.modules[COMPUTE])[kept].meta["val"]
        if value.dtype == self.dtype:
            return PassResult(graphs, changed=False)
        modules = {name: writable(graphs, name)[0] for name in (*compute_graphs(graphs), reader)}
        for name in compute_graphs(graphs):
            self._write(modules[name], kept)
        self._read(modules[reader], value.dtype)
        if FEATURE in outputs(modules[reader]):  # fed back
            self._write(modules[reader], FEATURE)
        return PassResult(replace(graphs, modules={**graphs.modules, **modules}), changed=True)

    def _write(self, module: fx.GraphModule, kept: str) -> None:
        results, end = outputs(module), next(iter(reversed(module.graph.nodes)))
        with module.graph.inserting_before(end):
            value = results[kept]
            if self.dtype == torch.float16:  # some models' features are larger than it can hold
                value = emit(value, aten.clamp.default, value, -HALF_MAX, HALF_MAX)
            cast = emit(value, CAST, value, dtype=self.dtype)
        end.args = ({**results, kept: cast},)
        finish(module)

    def _read(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        for name, node in placeholders(module).items():
            if name in (FEATURES, VELOCITIES) or name.startswith(f"{FEATURE}_"):
                readers = list(node.users)
                with module.graph.inserting_after(node):
                    cast = module.graph.call_function(CAST, (node,), {"dtype": dtype})
                for reader in readers:
                    reader.replace_input_with(node, cast)
        finish(module)
