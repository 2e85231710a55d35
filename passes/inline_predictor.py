"""Put a predictor into the forecast graph: in front of the tail, or one with a head and a tail of its own in its place."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, finish, inline, outputs, placeholders
from cachec.passes.split_model import extract
from cachec.runtime.abi import (
    COMPUTE,
    FEATURE,
    FORECAST,
    HISTORY_STEPS,
    SIGMAS,
    STEP,
    TOKENS,
    VELOCITY,
    history_name,
    history_window,
)
from cachec.runtime.errors import PassError

PREFIX = "predictor_"
SCHEDULE = (SIGMAS, STEP, HISTORY_STEPS)


@dataclass(frozen=True, eq=False)
class InlinePredictor(Pass):
    """Make the forecast graph of a ``predictor``, whose inputs become its own.

    One that gives ``feature`` reads features (``feature_0`` … from newest to oldest) and what it wants of the schedule; it
    stands in front of the tail, and its output becomes a second result, for methods that feed forecasts back. One that gives
    ``velocity`` is the model with other blocks: it reads what the model reads (latents, times, conditions) under the same
    names, and as ``feature_0`` the ``tokens`` of the newest computed step. They are what slots hold then, and forecasts are
    never fed back.
    """

    name: ClassVar[str] = "inline_predictor"
    predictor: fx.GraphModule

    def requires(self, graphs: Graphs) -> None:
        if FORECAST not in graphs.modules or FEATURE not in placeholders(graphs.modules[FORECAST]):
            raise PassError("the forecast graph has no input 'feature'; run split_model first")
        names = placeholders(self.predictor).keys()
        if VELOCITY in outputs(self.predictor):
            self._require_model(graphs, set(names))
        elif clash := names & placeholders(graphs.modules[FORECAST]).keys():
            raise PassError(f"predictor and tail both have inputs named {sorted(clash)}")

    def _require_model(self, graphs: Graphs, names: set[str]) -> None:
        compute = graphs.modules[COMPUTE]
        if TOKENS not in outputs(compute):
            raise PassError("the compute graph does not hand out the tokens that the predictor reads")
        if strange := names - placeholders(compute).keys() - {history_name(0)}:
            raise PassError(f"the predictor reads {sorted(strange)}, which the model does not")

    def run(self, graphs: Graphs) -> PassResult:
        graph, attributes = fx.Graph(), dict[str, torch.Tensor]()
        made, modules = inline(graph, self.predictor, attributes, prefix=PREFIX), dict(graphs.modules)
        if VELOCITY in made:
            graph.output({VELOCITY: made[VELOCITY]})
            results = outputs(modules[COMPUTE])
            modules[COMPUTE] = extract(modules[COMPUTE], {VELOCITY: results[VELOCITY], FEATURE: results[TOKENS]}, {})
            cut = None
        else:
            results = inline(graph, modules[FORECAST], attributes, {FEATURE: made[FEATURE]})
            graph.output({VELOCITY: results[VELOCITY], FEATURE: made[FEATURE]})
            cut = made[FEATURE].name
        modules[FORECAST] = fx.GraphModule(attributes, graph)
        finish(modules[FORECAST])
        axes = {**graphs.axes, FORECAST: {**graphs.axes.get(FORECAST, {}), **dict.fromkeys(SCHEDULE, ())}}
        return PassResult(replace(graphs, modules=modules, axes=axes, cut=cut), changed=True)

    def ensures(self, graphs: Graphs) -> None:
        kept = outputs(graphs.modules[COMPUTE])[FEATURE].meta["val"]
        for name, node in placeholders(graphs.modules[FORECAST]).items():
            read = node.meta["val"]
            if history_window([name]) and (read.dtype, read.shape[1:]) != (kept.dtype, kept.shape[1:]):
                raise PassError(f"the predictor reads {name} {list(read.shape)} {read.dtype}, slots hold {list(kept.shape)} "
                                f"{kept.dtype}")  # fmt: skip
