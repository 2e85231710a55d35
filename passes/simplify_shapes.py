"""Drop what changes nothing; write every change of shape in one way."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import Equivalence, GraphPass, sizes_by_name, tensors

aten = torch.ops.aten
SAME_VALUES = {  # of their first argument, if shape and type stay
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default),
    *(aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints, aten.expand.default),
    *(aten.squeeze.dim, aten.slice.Tensor),
}
RESHAPES = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints, aten._unsafe_view.default}


@dataclass(frozen=True)
class SimplifyShapes(GraphPass):
    """Drop dropouts, copies, casts to the same type, slices of everything and squeezes of other axes than those of size one.

    (PyTorch leaves such a squeeze without effect; ONNX shape inference rejects it.) What only changes the shape becomes
    ``reshape``, whose sizes are numbers but for one, and of several in a row the last remains.
    """

    name: ClassVar[str] = "simplify_shapes"
    equivalence: ClassVar[Equivalence] = Equivalence.ROUNDING  # copies lay values out anew, and products sum by layout

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        return [n for n in module.graph.nodes if n.op == "call_function" and (_is_idle(n) or _wanted(n) is not None)]

    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        for node in places:
            if _is_idle(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                module.graph.erase_node(node)  # here: a dropout counts as random, and would be kept as dead code
            elif (args := _wanted(node)) is not None and sizes_by_name(tensors(args[0])[0]) == sizes_by_name(tensors(node)[0]):
                node.replace_all_uses_with(args[0])  # undone
            elif args is not None:
                node.target, node.args, node.kwargs = aten.reshape.default, args, {}


def _is_idle(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target not in SAME_VALUES:
        return False
    (given,), (made,) = tensors(node.args[0]), tensors(node)  # type: ignore[arg-type]
    return given.dtype == made.dtype and given.device == made.device and sizes_by_name(given) == sizes_by_name(made)


def _wanted(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of the reshape that ``node`` should be, if it is not that already."""
    if node.target not in RESHAPES:
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in RESHAPES:
        source = source.args[0]
    sizes = [-1 if isinstance(size, torch.SymInt) else size for size in tensors(node)[0].shape]
    if sizes.count(-1) > 1:
        return None
    args = (source, sizes)
    return None if node.target is aten.reshape.default and node.args == args else args
