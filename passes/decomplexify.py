"""Write complex rotary embeddings in real arithmetic."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import GraphPass, Graphs, depends_on_inputs, emit
from cachec.runtime.errors import PassError

aten = torch.ops.aten


@dataclass(frozen=True)
class Decomplexify(GraphPass):
    """Rewrite ``view_as_real(view_as_complex(v) * c)``, where ``c`` depends on constants only; ONNX has no complex type.

    The parts of the product are computed as PyTorch's complex product computes them. Complex *constants* stay:
    ``fold_constants`` turns them into real ones. Any other complex value that depends on an input is refused.
    """

    name: ClassVar[str] = "decomplexify"

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return [n for n in module.graph.nodes if n.target == aten.view_as_real.default and _is_rotation(n.args[0])]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in places:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_real_product(node))

    def ensures(self, graphs: Graphs) -> None:
        for module in graphs.modules.values():
            for node in depends_on_inputs(module):
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor) and value.is_complex():
                    raise PassError(f"node {node.name} ({node.target}) computes a complex number, which ONNX cannot express")


def _is_rotation(product: fx.Node) -> bool:
    if product.target != aten.mul.Tensor:
        return False
    return any(isinstance(n, fx.Node) and n.target == aten.view_as_complex.default for n in product.args)


def _real_product(node: fx.Node) -> fx.Node:
    """Nodes for ``view_as_real(view_as_complex(pairs) * c)``; ``c`` broadcasts against ``pairs`` without its last axis."""
    left, right = node.args[0].args  # type: ignore[union-attr]
    if left.target != aten.view_as_complex.default:  # type: ignore[union-attr]
        left, right = right, left
    pairs, constant = left.args[0], emit(node, aten.view_as_real.default, right)  # type: ignore[union-attr]

    def part(source: Any, index: int) -> fx.Node:
        return emit(node, aten.select.int, source, -1, index)

    def times(a: int, b: int) -> fx.Node:
        return emit(node, aten.mul.Tensor, part(pairs, a), part(constant, b))

    real = emit(node, aten.sub.Tensor, times(0, 0), times(1, 1))
    imaginary = emit(node, aten.add.Tensor, times(0, 1), times(1, 0))
    return emit(node, aten.stack.default, [real, imaginary], -1)
