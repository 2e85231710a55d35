"""Put the predictor in front of the tail, inside the forecast graph."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, fetch, finish, outputs, placeholders
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
        if FEATURE not in placeholders(graphs.modules[FORECAST]):
            raise PassError("the forecast graph has no input 'feature'; run split_model first")
        clash = placeholders(self.predictor).keys() & placeholders(graphs.modules[FORECAST]).keys()
        if clash:
            raise PassError(f"predictor and tail both have inputs named {sorted(clash)}")

    def run(self, graphs: Graphs) -> PassResult:
        tail = graphs.modules[FORECAST]
        graph = fx.Graph()
        attributes: dict[str, torch.Tensor] = {}
        values: dict[fx.Node, fx.Node] = {}
        for source, prefix in ((self.predictor, PREFIX), (tail, "")):
            for node in source.graph.nodes:
                if node.op == "output" or node in values:
                    continue
                values[node] = graph.node_copy(node, values.__getitem__)
                values[node].meta = dict(node.meta)
                if node.op == "get_attr":
                    name = prefix + str(node.target).replace(".", "_") if prefix else str(node.target)
                    values[node].target = name
                    attributes[name] = fetch(source, str(node.target))
            if source is self.predictor:
                values[placeholders(tail)[FEATURE]] = values[outputs(self.predictor)[FEATURE]]
        graph.output({VELOCITY: values[outputs(tail)[VELOCITY]], FEATURE: values[placeholders(tail)[FEATURE]]})
        module = fx.GraphModule(attributes, graph)
        finish(module)
        schedule = dict.fromkeys((SIGMAS, STEP, HISTORY_STEPS), ())
        axes = {**graphs.axes, FORECAST: {**graphs.axes.get(FORECAST, {}), **schedule}}
        return PassResult(replace(graphs, modules={**graphs.modules, FORECAST: module}, axes=axes), changed=True)
