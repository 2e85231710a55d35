"""Torch-TensorRT cannot be imported without a GPU: that it converts every operator of our graphs is looked up in its lists.

Before it converts, Torch-TensorRT decomposes with torch's default table, less ``decompositions_disabled`` and attention, and
with ``decompositions_enabled``. Some tests look at all graphs as they are, others decompose some and look at what is left.
"""

import json
from pathlib import Path

import pytest
import torch
from torch._decomp import get_decompositions
from toy import example_inputs
from toy_bundle import IO, split_toy

from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import compute_only, engine, linear, prepare
from cachec.compiler.models import MODELS, load_model
from cachec.compiler.request import make_request
from cachec.passes import HOISTS

LISTS = json.loads((Path(__file__).parent.parent / "data" / "torch-tensorrt-2.13-ops.json").read_text())
CONVERTERS, ENABLED, DISABLED = (LISTS[key] for key in ("converters", "decompositions_enabled", "decompositions_disabled"))

BY_TORCH = {  # neither converted nor in Torch-TensorRT's own list: what torch's default table makes of them
    "aten.silu.default": "x * sigmoid(x)",
    "aten.layer_norm.default": "native_layer_norm, which is converted",
    "aten.rms_norm.default": "mean, rsqrt, mul",
    "aten.flatten.using_ints": "view",
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
def flux():
    """tiny-flux in float32: the model, its settings, and its graphs by cut."""
    model = load_model(MODELS["tiny-flux"])
    settings = make_request(MODELS["tiny-flux"], method="taylor").settings
    split = prepare(model, settings)
    return (
        model,
        settings,
        {"hidden": linear(split), "output": compute_only(split)},
    )


@pytest.fixture(scope="module")
def toy():
    split = split_toy()
    return {
        "hidden": linear(split),
        "output": compute_only(split),
    }


def toy_graphs(toy, cut, hoist):
    return engine(toy[cut], IO, hoist=hoist)


@pytest.fixture(scope="module")
def used(flux, toy):
    """Operators of all engine graphs: both models, both cuts, every hoist level."""
    model, _, graphs = flux
    found = set()
    for hoist in HOISTS:
        for cut in graphs:
            found |= targets(module.graph for module in engine(graphs[cut], model.io, hoist=hoist).modules.values())
            found |= targets(module.graph for module in toy_graphs(toy, cut, hoist).modules.values())
    return found


def test_every_operator_is_converted_or_decomposed(used):
    missing = {target for target in used if converter_of(target) is None and not set(names_of(target)) & set(ENABLED)}
    assert {names_of(target)[0] for target in missing} <= set(BY_TORCH)
    default = torch.export.default_decompositions()
    assert [str(target) for target in missing if target not in default and not target._can_decompose()] == []
    assert set(BY_TORCH).isdisjoint(DISABLED)


def test_conditional_converters_are_the_known_ones(used):
    assert {names_of(target)[0] for target in used if converter_of(target)} == CONDITIONAL


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


def left_over(plans):
    """What has no converter after decomposing."""
    table = decomposition_table()
    found = targets(plan.program.run_decompositions(table).graph for plan in plans)
    return {names_of(target)[0] for target in found if converter_of(target) is None}


@pytest.mark.parametrize("hoist", ["none", "all"])
def test_decomposed_graphs_of_the_toy_are_converted(toy, hoist):
    assert left_over(plan_engines(toy_graphs(toy, "hidden", hoist), example_inputs(), "latents", 10)) == set()


def test_decomposed_graphs_of_tiny_flux_are_converted(flux):
    model, settings, graphs = flux
    plans = plan_engines(
        engine(graphs["hidden"], model.io, hoist="none"), model.example_inputs(settings), model.io.latents, settings.steps
    )
    assert left_over(plans) == set()
