"""FLOPs of a graph, read off its shapes: of matrix products, attention and convolutions, a multiplication and an addition each.

Formulas are PyTorch's own (``torch.utils.flop_counter``), and of the operators that it takes apart before it counts them.
Everything else counts nothing, as is usual. Symbolic sizes count as one: one sample, one step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count, flop_registry, mm_flop, sdpa_flop_count

from cachec.passes.base import fetch

aten = torch.ops.aten
Shape = tuple[int, ...]


def sizes_of(value: torch.Tensor) -> Shape:
    """The shape of a value, with one for symbolic sizes."""
    return tuple(1 if isinstance(size, torch.SymInt) else int(size) for size in value.shape)


def run_flops(module: fx.GraphModule) -> int:
    """FLOPs of one run."""
    return sum(node_flops(node) for node in module.graph.nodes if node.op == "call_function")


def node_flops(node: fx.Node) -> int:
    """FLOPs of one call."""
    made, packet = node.meta.get("val"), getattr(node.target, "overloadpacket", None)
    formula = _FORMULAS.get(node.target) or flop_registry.get(packet)
    if formula is None or not isinstance(made, torch.Tensor):
        return 0
    given = fx.node.map_arg((node.args, node.kwargs), _argument)
    return int(formula(*given[0], **given[1], out_val=sizes_of(made)))


def _argument(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if node.op == "get_attr" and (module := node.graph.owning_module) is not None:  # not all that passes make has its value
        value = fetch(module, str(node.target))
    return sizes_of(value) if isinstance(value, torch.Tensor) else value


def _linear(given: Shape, weight: Shape, *_: Any, out_val: Shape) -> int:
    return int(mm_flop((math.prod(given[:-1]), given[-1]), weight[::-1]))


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_val: Shape, **__: Any) -> int:
    shapes = (_heads_apart(shape) for shape in (query, key, value))
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _heads_apart(shape: Shape) -> Shape:
    """Of four axes, as the formula takes them: batch, heads, tokens, channels."""
    padded = (1,) * (4 - len(shape)) + shape
    return (math.prod(padded[:-3]), *padded[-3:])


def _matmul(left: Shape, right: Shape, *, out_val: Shape) -> int:
    return 2 * math.prod(out_val) * left[-1]


def _convolution(given: Shape, weight: Shape, *_: Any, out_val: Shape) -> int:
    return int(conv_flop_count(list(given), list(weight), list(out_val)))


def _tensordot(left: Shape, right: Shape, axes: list[int], *_: Any, out_val: Shape) -> int:
    return 2 * math.prod(out_val) * math.prod(left[axis] for axis in axes)


_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _matmul,
    aten.tensordot.default: _tensordot,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
}
