"""One wide matrix product for several narrow ones."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import Equivalence, Graphs, Pass, PassResult, fetch, finish, writable

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Linear layers on the same value become one, which is split behind: queries, keys, values and what else reads the norm.

    In the prologue these are all modulations of a transformer; their results lie side by side in the order of the layers, so
    that nothing needs to be split. Weights that several graphs read stay as they are, so that they stay shared. Merged
    weights are copies.
    """

    name: ClassVar[str] = "merge_linears"
    equivalence: ClassVar[Equivalence] = Equivalence.ROUNDING

    def run(self, graphs: Graphs) -> PassResult:
        merged, changed = dict(graphs.modules), False
        for name, module in graphs.modules.items():
            others = {id(p) for n, one in graphs.modules.items() if n != name for p in one.parameters()}
            if groups := _groups(module, others):
                merged[name], nodes = writable(graphs, name)
                for group in groups:
                    _merge(merged[name], [nodes(node) for node in group])
                finish(merged[name])
                changed = True
        return PassResult(graphs.with_modules(**merged) if changed else graphs, changed=changed)


def _groups(module: fx.GraphModule, others: set[int]) -> list[list[fx.Node]]:
    """Linear layers to be merged, those on one value together."""
    found: dict[Any, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.linear.default and _is_own(module, node, others):
            biased = len(node.args) > 2 and node.args[2] is not None
            weight = fetch(module, str(node.args[1].target))
            found.setdefault((node.args[0], biased, weight.dtype), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _is_own(module: fx.GraphModule, node: fx.Node, others: set[int]) -> bool:
    """Are its weights constants that no other graph reads?"""
    weights = [value for value in node.args[1:] if isinstance(value, fx.Node)]
    return all(value.op == "get_attr" and id(fetch(module, str(value.target))) not in others for value in weights)


def _merge(module: fx.GraphModule, group: list[fx.Node]) -> None:
    graph, first = module.graph, group[0]
    names = []
    for place, kind in ((1, "weight"), (2, "bias"))[: len([value for value in first.args if value is not None]) - 1]:
        held = [fetch(module, str(node.args[place].target)) for node in group]  # type: ignore[union-attr]
        name = f"merged_{first.name}_{kind}"
        module.register_buffer(name, torch.cat([tensor.detach() for tensor in held]))
        names.append(name)
        sizes = [len(tensor) for tensor in held]
    with graph.inserting_before(first):
        wide = graph.call_function(aten.linear.default, (first.args[0], *map(graph.get_attr, names)))
        wide.meta = {key: value for key, value in first.meta.items() if key != "val"}
        cuts = graph.call_function(aten.split_with_sizes.default, (wide, sizes, -1))
        parts = [graph.call_function(operator.getitem, (cuts, number)) for number in range(len(group))]
    if all("val" in node.meta for node in group):
        example = first.meta["val"]
        wide.meta["val"] = example.new_empty((*example.shape[:-1], sum(sizes)))
        cuts.meta = {**wide.meta, "val": [node.meta["val"] for node in group]}
    for node, part in zip(group, parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
    _join(cuts, wide, parts)


def _join(cuts: fx.Node, wide: fx.Node, parts: list[fx.Node]) -> None:
    """Where all parts are put side by side again, take the whole."""
    for user in list(parts[0].users):
        if user.target is not aten.cat.default or list(user.args[1:]) not in ([1], [-1]):
            continue
        row = list(user.args[0])  # type: ignore[arg-type]
        start = row.index(parts[0])
        if row[start : start + len(parts)] == parts and _is_last_axis(user, wide):
            user.args = ([*row[:start], wide, *row[start + len(parts) :]], *user.args[1:])


def _is_last_axis(cat: fx.Node, wide: fx.Node) -> bool:
    value = wide.meta.get("val", cat.meta.get("val"))
    return list(cat.args[1:]) == [-1] or (isinstance(value, torch.Tensor) and value.ndim == 2)
