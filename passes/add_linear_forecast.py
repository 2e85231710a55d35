"""The forecast that all linear methods share: a weighted sum of what computed steps left in the slots."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import (
    ALL,
    CAST,
    Equivalence,
    Graphs,
    Groups,
    Pass,
    PassResult,
    emit,
    finish,
    inline,
    outputs,
    placeholders,
)
from cachec.runtime.abi import (
    BATCH,
    BIAS,
    COEFFICIENTS,
    COMPUTE,
    FEATURE,
    FEATURES,
    FORECAST,
    GROUPS,
    SLOTS,
    VELOCITY,
)
from cachec.runtime.errors import PassError

aten = torch.ops.aten
NUM_EXAMPLES = 2  # slots, in the values that nodes are noted with


@dataclass(frozen=True, eq=False)
class AddLinearForecast(Pass):
    """Replace the forecast graph's input ``feature`` by ``decode(coefficients @ features + bias)``, summed in float32.

    features [H, B, …], coefficients [G, H], a row for each of the ``groups`` of what is kept, bias scalar; where each row of a
    batch has its own, coefficients [B, H] and bias [B]. ``encode`` and ``decode`` are graphs from ``feature`` to ``feature``,
    by default none: the former stands behind the cut in the compute graph, so that it is done once for every feature that is
    kept, the latter in front of the tail. The sum is the cut from here on.
    """

    name: ClassVar[str] = "add_linear_forecast"
    encode: fx.GraphModule | None = None
    decode: fx.GraphModule | None = None
    groups: Groups = ALL

    def requires(self, graphs: Graphs) -> None:
        if FORECAST not in graphs.modules or FEATURE not in placeholders(graphs.modules[FORECAST]):
            raise PassError("the forecast graph has no input 'feature'; run split_model first")

    def run(self, graphs: Graphs) -> PassResult:
        modules = dict(graphs.modules)
        if self.encode is not None:
            modules[COMPUTE] = _encoded(modules[COMPUTE], self.encode)
        kept = outputs(modules[COMPUTE])[FEATURE].meta["val"]
        self._check([int(size) for size in kept.shape[1:]])
        modules[FORECAST], cut = _summed(modules[FORECAST], kept, self.decode, self.groups)
        weights, bias = ((BATCH, SLOTS), (BATCH,)) if self.groups.by_row else ((GROUPS, SLOTS), ())
        axes = {**graphs.axes, FORECAST: {FEATURES: (SLOTS, BATCH), COEFFICIENTS: weights, BIAS: bias}}
        return PassResult(replace(graphs, modules=modules, cut=cut, axes=axes, groups=self.groups), changed=True)

    def _check(self, kept: list[int]) -> None:
        """Raise ``PassError`` unless the groups are all of what is ``kept`` of a sample."""
        sizes, axis = self.groups.sizes, self.groups.axis
        if sizes and not (0 < axis <= len(kept) and sum(sizes) == kept[axis - 1] and min(sizes) > 0):
            raise PassError(f"groups of {list(sizes)} along axis {axis} are not all of what is kept, {kept} a sample")


@dataclass(frozen=True, eq=False)
class AddCodedForecast(AddLinearForecast):
    """The same with a code, which gives features back up to rounding."""

    name: ClassVar[str] = "add_coded_forecast"
    equivalence: ClassVar[Equivalence] = Equivalence.ROUNDING


def _encoded(module: fx.GraphModule, encode: fx.GraphModule) -> fx.GraphModule:
    graph, attributes = fx.Graph(), dict[str, torch.Tensor]()
    results = inline(graph, module, attributes)
    (coded,) = inline(graph, encode, attributes, {FEATURE: results[FEATURE]}, prefix="encode_").values()
    graph.output({**results, FEATURE: coded})
    new = fx.GraphModule(attributes, graph)
    finish(new)
    return new


def _summed(
    tail: fx.GraphModule, kept: torch.Tensor, decode: fx.GraphModule | None, groups: Groups
) -> tuple[fx.GraphModule, str]:
    """The tail behind the weighted sum of values like ``kept``; and the name of that sum's node."""
    graph, attributes = fx.Graph(), dict[str, torch.Tensor]()

    def given(name: str, value: torch.Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = {"val": value}
        return node

    features = given(FEATURES, kept.new_empty((NUM_EXAMPLES, *kept.shape)))
    weights, offset = ((kept.shape[0], NUM_EXAMPLES), (kept.shape[0],)) if groups.by_row else ((groups.count, NUM_EXAMPLES), ())
    coefficients = given(COEFFICIENTS, kept.new_empty(weights, dtype=torch.float32))
    bias = given(BIAS, kept.new_empty(offset, dtype=torch.float32))
    narrow = kept.dtype != torch.float32
    wide = emit(features, CAST, features, dtype=torch.float32) if narrow else features
    each = _in_front(bias, kept.ndim - 1) if groups.by_row else bias
    summed = emit(features, aten.add.Tensor, _weighted(wide, coefficients, groups), each)
    summed = emit(features, CAST, summed, dtype=kept.dtype) if narrow else summed
    feature = summed
    if decode is not None:
        (feature,) = inline(graph, decode, attributes, {FEATURE: summed}, prefix="decode_").values()
    results = inline(graph, tail, attributes, {FEATURE: feature})
    graph.output({VELOCITY: results[VELOCITY]})
    new = fx.GraphModule(attributes, graph)
    finish(new)
    return new, summed.name


def _weighted(features: fx.Node, coefficients: fx.Node, groups: Groups) -> fx.Node:
    """The sum [B, …] over slots [H, B, …], each group by its own row of the coefficients [G, H], or each row by its [B, H]."""
    if groups.by_row:
        rows = _in_front(emit(coefficients, aten.permute.default, coefficients, [1, 0]), features.meta["val"].ndim - 2)
        weighted = emit(features, aten.mul.Tensor, features, rows)
        return emit(features, aten.sum.dim_IntList, weighted, [0])
    if groups.count == 1:
        row = emit(coefficients, aten.squeeze.dim, coefficients, 0)
        return emit(features, aten.tensordot.default, row, features, [0], [0])
    parts = []
    for number in range(groups.count):
        part = emit(features, aten.slice.Tensor, features, groups.axis + 1, *groups.part(number))
        row = emit(coefficients, aten.select.int, coefficients, 0, number)
        parts.append(emit(features, aten.tensordot.default, row, part, [0], [0]))
    return emit(features, aten.cat.default, parts, groups.axis)


def _in_front(numbers: fx.Node, axes: int) -> fx.Node:
    """Numbers [..., B] in front of so many axes that they are the same for."""
    for _ in range(axes):
        numbers = emit(numbers, aten.unsqueeze.default, numbers, -1)
    return numbers
