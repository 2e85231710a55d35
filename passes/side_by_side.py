"""What the prologue hands to a step graph for a step, side by side in one input, and how the step graph takes it apart."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from cachec.passes.base import finish, placeholders

aten = torch.ops.aten
CUTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
RESHAPES = {aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.expand.default}


def size_of(node: fx.Node) -> int:
    """Elements of a value for one sample."""
    return math.prod(int(size) for size in node.meta["val"].shape[1:])


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a value of the border: the node that gives it in the step graph, its size, and what was added to it."""

    node: fx.Node
    size: int
    added: float = 0.0


def parts_of(node: fx.Node) -> list[Part]:
    """The pieces [B, d] that the step graph cuts a value [B, …] into, if it does nothing else with it.

    A number that is added to all of a piece (the 1 of a scale) is added ahead.
    """
    cut = next(iter(node.users))
    if len(node.users) > 1 or cut.target not in CUTS or node.meta["val"].ndim != 2 or cut.args[-1] not in (1, -1):
        return [Part(node, size_of(node))]
    parts = [_follow(piece) for piece in sorted(cut.users, key=lambda user: int(str(user.args[1])))]
    if sum(part.size for part in parts) != size_of(node):  # a piece is not used: leave it to the step graph
        return [Part(node, size_of(node))]
    return parts


def _follow(piece: fx.Node) -> Part:
    """The last mere form of a piece that is all that its readers see."""
    node, added = piece, 0.0
    while len(node.users) == 1:
        user = next(iter(node.users))
        numbers = [value for value in user.args if isinstance(value, int | float)]
        if user.target is aten.add.Tensor and len(numbers) == 1 and not user.kwargs and not added:
            added = float(numbers[0])
        elif user.target not in RESHAPES or size_of(user) != size_of(piece):  # an expansion is left to the step graph
            break
        node = user
    return Part(node, size_of(piece), added)


def unpack(module: fx.GraphModule, label: str, parts: Mapping[str, Part]) -> None:
    """Replace the inputs ``parts`` by one input that holds them side by side."""
    graph, inputs = module.graph, placeholders(module)
    values = {name: part.node.meta["val"] for name, part in parts.items()}
    sizes = [part.size for part in parts.values()]
    example = next(iter(values.values()))
    with graph.inserting_before(next(iter(graph.nodes))):
        packed = graph.placeholder(label)
    packed.meta = {"val": example.new_empty((example.shape[0], sum(sizes)))}
    with graph.inserting_before(next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))):
        wide = any(value.ndim == 3 for value in values.values())  # [B, 1, d], as modulations are read
        row = graph.call_function(aten.unsqueeze.default, (packed, 1)) if wide else packed
        cuts = graph.call_function(aten.split_with_sizes.default, (row, sizes, -1))
        for number, (name, value) in enumerate(values.items()):
            part = graph.call_function(operator.getitem, (cuts, number))
            shape = [int(size) for size in value.shape[1:]]
            if shape != [*[1] * wide, sizes[number]]:
                part = graph.call_function(aten.view.default, (part, [-1, *shape]))
            part.meta = {"val": value}
            inputs[name].replace_all_uses_with(part)
            graph.erase_node(inputs[name])
    finish(module)
