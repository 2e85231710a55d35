"""Turn ``type_as`` into a cast to a known dtype."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, emit


@dataclass(frozen=True)
class ReplaceTypeAs(GraphPass):
    """Cast to the dtype that ``y`` has, instead of ``x.type_as(y)``.

    The latter ties the graph to ``y``'s value: a forecast graph would have to be given a tensor that it never looks at
    (Wan's text states).
    """

    name: ClassVar[str] = "replace_type_as"

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return [n for n in module.graph.nodes if n.target == torch.ops.aten.type_as.default]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in places:
            source, like = node.args
            with module.graph.inserting_before(node):
                dtype = like.meta["val"].dtype  # type: ignore[union-attr]
                node.replace_all_uses_with(emit(node, torch.ops.aten._to_copy.default, source, dtype=dtype))
