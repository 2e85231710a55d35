"""Slots of a smaller type: features and velocities are stored in it, and read as what they were."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, copy_module, emit, finish, outputs, placeholders
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
    dtype: torch.dtype

    def run(self, graphs: Graphs) -> PassResult:
        reader, kept = (FORECAST, FEATURE) if FORECAST in graphs.modules else (ADVANCE, VELOCITY)
        value = outputs(graphs.modules[COMPUTE])[kept].meta["val"]
        if value.dtype == self.dtype:
            return PassResult(graphs, changed=False)
        modules = {**graphs.modules, COMPUTE: self._writing(graphs.modules[COMPUTE], kept)}
        modules[reader] = self._reading(modules[reader], value.dtype)
        if FEATURE in outputs(modules[reader]):  # fed back
            modules[reader] = self._writing(modules[reader], FEATURE)
        return PassResult(replace(graphs, modules=modules), changed=True)

    def _writing(self, module: fx.GraphModule, kept: str) -> fx.GraphModule:
        module = copy_module(module)
        results, end = outputs(module), next(iter(reversed(module.graph.nodes)))
        with module.graph.inserting_before(end):
            value = results[kept]
            if self.dtype == torch.float16:  # some models' features are larger than it can hold
                value = emit(value, aten.clamp.default, value, -HALF_MAX, HALF_MAX)
            cast = emit(value, aten.to.dtype, value, self.dtype)
        end.args = ({**results, kept: cast},)
        finish(module)
        return module

    def _reading(self, module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
        module = copy_module(module)
        for name, node in placeholders(module).items():
            if name in (FEATURES, VELOCITIES) or name.startswith(f"{FEATURE}_"):
                readers = list(node.users)
                with module.graph.inserting_after(node):
                    cast = module.graph.call_function(aten.to.dtype, (node, dtype))
                for reader in readers:
                    reader.replace_input_with(node, cast)
        finish(module)
        return module
