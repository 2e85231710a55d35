"""Torch-TensorRT cannot be imported without a GPU: that it converts every operator of our graphs is looked up in its lists.

Before it converts, Torch-TensorRT decomposes with torch's default table, less ``decompositions_disabled`` and attention, and
with ``decompositions_enabled``. The graphs are looked at as they are; what only decomposing makes convertible is decomposed
on its own.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch._decomp import get_decompositions

from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.models import wrap_pipeline
from cachec.compiler.models.base import Settings

LISTS = json.loads((Path(__file__).parent.parent / "data" / "torch-tensorrt-2.13-ops.json").read_text())
CONVERTERS, ENABLED, DISABLED = (LISTS[key] for key in ("converters", "decompositions_enabled", "decompositions_disabled"))

BY_TORCH = {  # neither converted nor in Torch-TensorRT's own list: what torch's default table makes of them
    "aten.silu.default": "x * sigmoid(x)",
    "aten.layer_norm.default": "native_layer_norm, which is converted",
    "aten.rms_norm.default": "mean, rsqrt, mul",
    "aten.flatten.using_ints": "view",
    "aten.chunk.default": "split, which is converted",
}
CONDITIONAL = {  # converters that take some calls only, which a GPU has to show
    "aten.cat.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.scaled_dot_product_attention.default",
    "aten.clone.default",
    "operator.getitem",
}


def names_of(target):
    """The names that the lists may have an operator under: with its overload, and without."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target), str(target.overloadpacket)
    return (f"operator.{target.__name__}",)


def converter_of(target):
    """Its entry among the converters: ``True`` if it is conditional, ``None`` if there is none."""
    spelled = (f"torch.ops.{name}" if name.startswith("aten.") else name for name in names_of(target))
    return next((CONVERTERS[name] for name in spelled if name in CONVERTERS), None)


def targets(graphs):
    return {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.fixture(scope="module")
def engines():
    """Engine graphs of a small FLUX, both kinds of block, hoisted and not."""
    shape = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, guidance_embeds=True, axes_dims_rope=(8, 12, 12), **shape
    )
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer.eval(), **parts)
    model, settings = wrap_pipeline(pipeline), Settings(64, 64, 8, 3.5, 10, "float32")
    with torch.no_grad():
        graphs = linear(prepare(model, settings))
        return [engine(graphs, model.io, hoist=hoist) for hoist in ("none", "all")]


@pytest.fixture(scope="module")
def used(engines):
    """Operators of all of them."""
    return targets(module.graph for graphs in engines for module in graphs.modules.values())


def test_every_operator_is_converted_or_decomposed(used):
    missing = {target for target in used if converter_of(target) is None and not set(names_of(target)) & set(ENABLED)}
    assert {names_of(target)[0] for target in missing} <= set(BY_TORCH)
    default = torch.export.default_decompositions()
    assert [str(target) for target in missing if target not in default and not target._can_decompose()] == []
    assert set(BY_TORCH).isdisjoint(DISABLED)


def test_conditional_converters_are_the_known_ones(used):
    assert {names_of(target)[0] for target in used if converter_of(target)} <= CONDITIONAL


def test_symbolic_sizes_are_converted(used):
    assert torch.ops.aten.sym_size.int in used
    assert converter_of(torch.ops.aten.sym_size.int) is False


def decomposition_table():
    """As Torch-TensorRT makes it, but for its own rewrites; attention stays whole (its option ``decompose_attention``)."""
    ops = [getattr(getattr(torch.ops, name.split(".")[0]), name.split(".")[1]) for name in ENABLED]
    picked = {
        packet if len(name.split(".")) == 2 else getattr(packet, name.split(".")[2])
        for name, packet in zip(ENABLED, ops, strict=True)
    }
    table = {**get_decompositions(picked), **torch.export.default_decompositions().materialize()}
    kept = {target for target in table if "scaled_dot_product" in str(target) or set(names_of(target)) & set(DISABLED)}
    return {target: rule for target, rule in table.items() if target not in kept}


def test_what_torch_decomposes_is_converted_then():
    class All(torch.nn.Module):
        def forward(self, x):
            f = torch.nn.functional
            y = f.rms_norm(f.layer_norm(f.silu(x), (8,)), (8,))
            return f.scaled_dot_product_attention(y, *y.chunk(1)[:1], y).flatten(1)

    program = torch.export.export(All(), (torch.ones(1, 2, 4, 8),)).run_decompositions({})
    views = {"aten.flatten.using_ints", "aten.chunk.default"}  # which export has decomposed
    assert {names_of(target)[0] for target in targets([program.graph])} >= BY_TORCH.keys() - views
    found = targets([program.run_decompositions(decomposition_table()).graph])
    assert {names_of(target)[0] for target in found if converter_of(target) is None} == set()
