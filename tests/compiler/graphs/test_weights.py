"""Weights that are named and not held: passes work on them, and their values are those of the module."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import ToyDiT, example_inputs
from toy_bundle import IO, LAST_BLOCK, STEPS

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear
from cachec.compiler.graphs.weights import Values, expression, is_named, named_module, recording
from cachec.compiler.models.shards import Stored
from cachec.passes import canonical_passes, cast_passes, run_passes, split_passes
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE
from cachec.runtime.errors import PassError


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The toy on disk, in bfloat16."""
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in ToyDiT().state_dict().items()}, path)
    return Stored.open(partial(ToyDiT, head_axis=True), [path], "config.json")


@pytest.fixture(scope="module")
def captured(stored):
    """The toy from its files, and the same with its values in memory."""
    held = ToyDiT(head_axis=True).eval().to(torch.bfloat16).float()
    return capture_model(named_module(stored), example_inputs()), capture_model(held, example_inputs())


def split(graphs, dtype):
    with recording():
        return run_passes(graphs, [canonical_passes(), cast_passes(dtype), split_passes(LAST_BLOCK)])


def assert_equal(named, held, inputs):
    assert all(map(is_named, named.parameters()))
    got, wanted = Values().module(named)(**inputs), held(**inputs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graphs_of_named_weights_are_those_of_the_module_bit_by_bit(captured, dtype):
    named, held = (split(graphs, dtype).modules[COMPUTE] for graphs in captured)
    assert_equal(named, held, example_inputs())


def test_so_are_those_that_engines_are_built_from(captured):
    named, held = (engine(linear(split(graphs, torch.bfloat16)), IO) for graphs in captured)
    (plan,) = [plan for plan in plan_engines(named, example_inputs(), "latents", STEPS) if plan.name == PROLOGUE]
    assert_equal(named.modules[PROLOGUE], held.modules[PROLOGUE], plan.program.example_inputs[1])


def test_a_weight_that_two_graphs_read_is_evaluated_once(captured):
    real = Values().graphs(split(captured[0], torch.bfloat16))
    compute, forecast = (dict(real.modules[name].named_parameters()) for name in (COMPUTE, FORECAST))
    shared = compute.keys() & forecast.keys()
    assert shared
    assert all(compute[name] is forecast[name] for name in shared)


def test_what_is_stored_in_the_wanted_type_is_read_as_it_is(captured):
    weight = split(captured[0], torch.bfloat16).modules[COMPUTE].get_parameter("model.out.weight_bfloat16")
    assert (expression(weight).name, expression(weight).dtype) == ("out.weight", torch.bfloat16)


def test_joined_weights_come_in_pieces(stored):
    module = named_module(stored)
    with recording():
        whole = torch.cat([module.blocks[0].qkv.weight.detach(), module.blocks[1].qkv.weight.detach()])
        turned = whole.t()
    values = Values()
    pieces = list(values.pieces(whole))
    assert [len(piece) for piece in pieces] == [24, 24]
    assert torch.equal(torch.cat(pieces), values.of(whole))
    assert torch.equal(values.of(turned), values.of(whole).t())
    assert values.key(turned) != values.key(whole)


def test_a_weight_may_be_made_with_tables(stored):
    weight, table = named_module(stored).out.weight, torch.arange(8.0)
    down, up = torch.randn(2, 8), torch.randn(len(weight), 2)  # an adapter of low rank
    with recording():
        made = nn.Parameter((weight + 1) * table, requires_grad=False)
        adapted = nn.Parameter(weight + 0.5 * (up @ down), requires_grad=False)
    assert torch.equal(Values().of(made), (Values().of(weight) + 1) * table)
    assert torch.equal(Values().of(adapted), Values().of(weight) + 0.5 * (up @ down))


def test_a_weight_whose_making_was_not_seen_is_refused(stored):
    weight = named_module(stored).out.weight
    made = weight.detach() + 1
    with recording():
        (half, _) = weight.detach().chunk(2)
    for tensor in (made, half):
        with pytest.raises(PassError, match=r"a weight \[., 8\] torch.float32 has no value"):
            Values().of(tensor)
