"""Split the model into the compute and the forecast graph."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import Graphs, Pass, PassResult, backward_slice, fetch, finish, outputs, placeholders
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, MODEL, TOKENS, VELOCITY
from cachec.runtime.errors import PassError


@dataclass(frozen=True)
class SplitModel(Pass):
    """Cut the model at the marked value, by backward slices.

    compute: all inputs → ``velocity`` and ``feature``, and ``tokens`` if the model hands them out. forecast: ``feature`` and
    what else the tail reads → ``velocity``. Parameters that both need are the same objects.
    """

    name: ClassVar[str] = "split_model"

    def requires(self, graphs: Graphs) -> None:
        if graphs.cut is None:
            raise PassError("the cut is not marked; run find_cut first")

    def run(self, graphs: Graphs) -> PassResult:
        model = graphs.modules[MODEL]
        cut = next(n for n in model.graph.nodes if n.name == graphs.cut)
        velocity, tokens = outputs(model)[VELOCITY], outputs(model).get(TOKENS)
        compute = extract(model, {VELOCITY: velocity, FEATURE: cut, **({} if tokens is None else {TOKENS: tokens})}, {})
        forecast = extract(model, {VELOCITY: velocity}, {cut: FEATURE})
        return PassResult(replace(graphs, modules={COMPUTE: compute, FORECAST: forecast}), changed=True)

    def ensures(self, graphs: Graphs) -> None:
        compute, forecast = graphs.modules[COMPUTE], graphs.modules[FORECAST]
        if FEATURE not in placeholders(forecast):
            raise PassError("the tail does not read the cut: the block is not on the way to the output")
        shared = {id(p) for p in compute.parameters()}
        strange = [name for name, p in forecast.named_parameters() if id(p) not in shared]
        if strange:
            raise PassError(f"forecast holds parameters that compute does not share: {', '.join(strange)}")


def extract(module: fx.GraphModule, results: Mapping[str, fx.Node], replaced: Mapping[fx.Node, str]) -> fx.GraphModule:
    """The backward slice of ``results``, with the nodes ``replaced`` turned into inputs of the given names."""
    needed = backward_slice(results.values(), replaced)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node, name in replaced.items():
        values[node] = graph.placeholder(name)
        values[node].meta = {"val": node.meta["val"]}
    for node in module.graph.nodes:
        if node in needed and node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = dict(node.meta)
    graph.output({name: values[node] for name, node in results.items()})
    new = fx.GraphModule(_attributes(module, graph), graph)
    finish(new)
    return new


def _attributes(module: fx.GraphModule, graph: fx.Graph) -> dict[str, torch.Tensor]:
    return {str(n.target): fetch(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
