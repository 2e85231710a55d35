"""Put a predictor in front of the tail, inside the forecast graph."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, finish, inline, placeholders
from cachec.runtime.abi import FEATURE, FORECAST, HISTORY_STEPS, SIGMAS, STEP, VELOCITY
from cachec.runtime.errors import PassError

PREFIX = "predictor_"


@dataclass(frozen=True, eq=False)
class InlinePredictor(Pass):
    """Replace the forecast graph's input ``feature`` by a copy of ``predictor``.

    The predictor's own inputs (``feature_0`` … from newest to oldest, and what of the schedule it reads) become inputs of
    the forecast graph; its output becomes a second result, ``feature``, for methods that feed forecasts back.
    """

    name: ClassVar[str] = "inline_predictor"
    predictor: fx.GraphModule

    def requires(self, graphs: Graphs) -> None:
        if FORECAST not in graphs.modules or FEATURE not in placeholders(graphs.modules[FORECAST]):
            raise PassError("the forecast graph has no input 'feature'; run split_model first")
        clash = placeholders(self.predictor).keys() & placeholders(graphs.modules[FORECAST]).keys()
        if clash:
            raise PassError(f"predictor and tail both have inputs named {sorted(clash)}")

    def run(self, graphs: Graphs) -> PassResult:
        graph, attributes = fx.Graph(), dict[str, torch.Tensor]()
        feature = inline(graph, self.predictor, attributes, prefix=PREFIX)[FEATURE]
        results = inline(graph, graphs.modules[FORECAST], attributes, {FEATURE: feature})
        graph.output({VELOCITY: results[VELOCITY], FEATURE: feature})
        module = fx.GraphModule(attributes, graph)
        finish(module)
        schedule = dict.fromkeys((SIGMAS, STEP, HISTORY_STEPS), ())
        axes = {**graphs.axes, FORECAST: {**graphs.axes.get(FORECAST, {}), **schedule}}
        return PassResult(
            replace(graphs, modules={**graphs.modules, FORECAST: module}, axes=axes, cut=feature.name), changed=True
        )
