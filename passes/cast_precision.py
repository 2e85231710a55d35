"""Low precision, written into the graph: every cast is a node."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from cachec.passes.base import CAST, Equivalence, GraphPass, Graphs, emit, fetch, outputs, shape_of, sizes_by_name, tensors
from cachec.runtime.abi import MODEL, VELOCITY
from cachec.runtime.errors import PassError

aten = torch.ops.aten
WIDE_TYPE = torch.float32
HALF_MAX = torch.finfo(torch.float16).max

NARROW = {  # where the time goes; they sum in float32 inside
    *("linear", "addmm", "addmv", "mm", "mv", "bmm", "baddbmm", "matmul", "einsum", "tensordot"),
    *("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
}
WIDE = {  # norms, what sums up many values, and functions that are steep or that embeddings are made of
    *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "native_group_norm", "instance_norm"),
    *("batch_norm", "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp"),
    *("mean", "sum", "var", "var_mean", "std", "norm", "linalg_vector_norm", "cumsum", "prod"),
    *("rsqrt", "sqrt", "reciprocal", "pow", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan"),
}
SUMS = {"add", "sub", "rsub", "addcmul", "addcdiv"}
CASTS = {"to", "_to_copy", "type", "type_as", "float", "half", "double", "bfloat16", "convert_element_type"}


@dataclass(frozen=True)
class CastPrecision(GraphPass):
    """From a model in any precision to one in ``dtype`` with float32 where it matters.

    Floating values get one of two types, operator by operator:

    - ``NARROW`` operators (matrix products, convolutions, attention) read and give ``dtype``;
    - ``WIDE`` operators (norms, softmax, sums over an axis, roots, powers, exponentials, sines) read and give float32;
    - all others take the wider of what they read. A product with a float32 table is float32, then: so is the rotation of
      queries and keys, up to the attention;
    - but a sum is ``dtype`` if a term as large as the sum is: that is the residual stream, whatever a branch, a table of
      positions or a gate adds to it. Modulations, which are broadcast, leave what a norm gave in float32.

    Casts that the model makes itself are dropped, float64 becomes float32, and the velocity is float32; of a graph that gives
    none, all floating results are. Weights are converted here, once; those that have their type are kept, as the same objects.
    Casts to ``dtype`` stand where the value is made, and are shared; casts to float32 where it is read, so that the value
    that leaves a block is the narrow one.

    float16 ends at 65,504. Sums of the residual stream are kept within: FLUX.1's go beyond in deep blocks, and diffusers clips
    them, too, when loaded in float16. So are converted tables (masks). Not handled in float16: products that go
    beyond, which become infinite, and numbers below 6e-8, which vanish (what Sana's linear attention adds to a divisor); so
    prefer bfloat16 where there is a choice. Not handled at all: low precision inside operators that are not listed.
    """

    name: ClassVar[str] = "cast_precision"
    equivalence: ClassVar[Equivalence] = Equivalence.PRECISION
    only: ClassVar[tuple[str, ...]] = (MODEL,)
    dtype: torch.dtype

    def places(self, module: fx.GraphModule) -> list[fx.Node]:
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        strange = self.dtype != WIDE_TYPE or any(_is_cast(n) for n in calls)
        return calls if strange or any(v.dtype != WIDE_TYPE for n in module.graph.nodes for v in _floats(n)) else []

    @torch.no_grad()
    def edit(self, module: fx.GraphModule, places: list[fx.Node]) -> None:
        caster = _Caster(module, self.dtype)
        for node in places:
            caster.visit(node)
        end = next(iter(reversed(module.graph.nodes)))
        results = outputs(module)
        wide = [VELOCITY] if VELOCITY in results else [name for name, value in results.items() if _is_float(value)]
        end.args = ({**results, **{name: caster.cast(results[name], WIDE_TYPE, end) for name in wide}},)

    def ensures(self, graphs: Graphs) -> None:
        for node in graphs.modules[MODEL].graph.nodes:
            narrow, wide = (operator_name(node) in names for names in (NARROW, WIDE))
            allowed = {self.dtype} if narrow else {WIDE_TYPE} if wide else {self.dtype, WIDE_TYPE}
            for value in _floats(node):
                if value.dtype not in allowed and (node.users or node.op != "placeholder"):
                    raise PassError(f"node {node.name} ({node.target}) gives {value.dtype} where {allowed} is meant")


@dataclass(eq=False)
class _Caster:
    """Types one graph in place, node by node in order; ``changes`` counts what it edited."""

    module: fx.GraphModule
    dtype: torch.dtype
    changes: int = 0
    _made: dict[tuple[Any, torch.dtype], fx.Node] = field(default_factory=dict)  # shared casts, converted attributes
    _known: dict[Hashable, Any] = field(default_factory=dict)  # what calls give: large models repeat theirs by the thousand

    def visit(self, node: fx.Node) -> None:
        name, inputs = operator_name(node), [value for value in node.all_input_nodes if _is_float(value)]
        if _is_cast(node):
            node.replace_all_uses_with(inputs[0])
            self.module.graph.erase_node(node)
            self.changes += 1
            return
        stream = self._is_stream(node, inputs)
        casts = {value: self.cast(value, self._type_of(node, inputs, stream=stream), node) for value in inputs}
        given = fx.node.map_arg((node.args, node.kwargs), lambda value: casts.get(value, value))
        wanted = fx.node.map_aggregate(given, lambda value: self._named_type(value, name))
        self.changes += wanted != given
        node.args, node.kwargs = wanted
        if self.changes and _floats(node):
            node.meta["val"] = self._evaluated(node)
        if stream and len(inputs) > 1 and self.dtype == torch.float16:
            self._keep_finite(node)

    def cast(self, node: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """The value of ``node`` in ``dtype``, for ``reader``."""
        if node.meta["val"].dtype == dtype:
            return node
        graph, shared = self.module.graph, dtype == self.dtype
        key = (node.target if node.op == "get_attr" else node, dtype)
        if key not in self._made:
            if node.op == "get_attr":
                new = self._converted(node, dtype)
            else:
                with graph.inserting_after(node) if shared else graph.inserting_before(reader):
                    new = emit(node if shared else reader, CAST, node, dtype=dtype)
            self.changes += 1
            if not shared and node.op != "get_attr":
                return new
            self._made[key] = new
        return self._made[key]

    def _type_of(self, node: fx.Node, inputs: list[fx.Node], *, stream: bool) -> torch.dtype:
        """What ``node`` is to read."""
        if operator_name(node) in NARROW or stream:
            return self.dtype
        telling = [value for value in inputs if value.meta["val"].ndim] or inputs  # numbers take the type of tensors
        narrow = all(value.meta["val"].dtype == self.dtype for value in telling)
        return self.dtype if narrow and operator_name(node) not in WIDE else WIDE_TYPE

    def _is_stream(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        if operator_name(node) not in SUMS:
            return False
        values = [value.meta["val"] for value in inputs]
        return any(value.dtype == self.dtype and sizes_by_name(value) == sizes_by_name(node.meta["val"]) for value in values)

    def _named_type(self, value: Any, name: str) -> Any:
        """An argument that may be a type: that of what ``name`` gives."""
        if not isinstance(value, torch.dtype) or not value.is_floating_point:
            return value
        return self.dtype if value == self.dtype and name not in WIDE | CASTS else WIDE_TYPE

    def _converted(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The weight or table in another type, as an attribute beside it."""
        value = fetch(self.module, str(node.target))
        new = value.detach()
        if dtype == torch.float16:
            new = new.clamp(-HALF_MAX, HALF_MAX)
        new = new.to(dtype)
        owner, _, name = str(node.target).rpartition(".")
        name, owning = f"{name}_{str(dtype).removeprefix('torch.')}", self.module.get_submodule(owner)
        if isinstance(value, torch.nn.Parameter):
            owning.register_parameter(name, torch.nn.Parameter(new, requires_grad=False))
        else:
            owning.register_buffer(name, new)
        with self.module.graph.inserting_after(node):
            made = self.module.graph.get_attr(f"{owner}.{name}" if owner else name)
        made.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
        return made

    def _evaluated(self, node: fx.Node) -> Any:
        """What ``node`` gives, as far as shapes and types go."""
        if not any(isinstance(value.meta.get("val"), torch.Tensor | list | tuple) for value in node.all_input_nodes):
            made = node.meta["val"]  # a value that is made from sizes
            return made.to(node.kwargs.get("dtype") or made.dtype)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda value: value.meta["val"])
        key = (node.target, _kind(args), tuple((name, _kind(value)) for name, value in kwargs.items()))
        if key not in self._known:
            self._known[key] = shape_of(node.target, *args, **kwargs)
        return self._known[key]

    def _keep_finite(self, node: fx.Node) -> None:
        """Clamp a sum, unless that is done already."""
        if all(user.target is aten.clamp.default for user in node.users):
            return
        with self.module.graph.inserting_after(node):
            kept = emit(node, aten.clamp.default, node, -HALF_MAX, HALF_MAX)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
        self.changes += 1


def operator_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload; empty for what is none."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_cast(node: fx.Node) -> bool:
    """From one floating type to another: the model's own."""
    return operator_name(node) in CASTS and _is_float(node) and any(map(_is_float, node.all_input_nodes))


def _floats(node: fx.Node) -> list[torch.Tensor]:
    """The floating values of a node, which may give several."""
    return [value for value in tensors(node) if value.is_floating_point()]


def _is_float(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and bool(_floats(node))


def _kind(value: Any) -> Hashable:
    """The same for arguments of which an operator makes results of the same shape and type."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, *(str(size) for size in (*value.shape, *value.stride())))
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return f"{type(value).__name__} {value}"
