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


def split(module, dtype):
    with recording():
        passes = [canonical_passes(), cast_passes(dtype), split_passes(LAST_BLOCK)]
        return run_passes(capture_model(module, example_inputs()), passes)


@pytest.fixture(scope="module")
def in_memory():
    """The same toy, its values in memory."""
    return ToyDiT(head_axis=True).eval().to(torch.bfloat16).float()


def weights_of(graphs):
    return [value for module in graphs.modules.values() for value in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_of_named_weights_are_those_of_the_module_bit_by_bit(stored, in_memory, dtype):
    named, held = split(named_module(stored), dtype), split(in_memory, dtype)
    assert all(map(is_named, weights_of(named)))
    inputs = example_inputs()
    for graphs in ((named, held), (engine(linear(named), IO), engine(linear(held), IO))):
        values = Values()
        for name in (COMPUTE, PROLOGUE):
            if name not in graphs[0].modules:
                continue
            programs = (
                [plan_engines(one, inputs, "latents", STEPS) for one in graphs] if PROLOGUE in graphs[0].modules else None
            )
            given = inputs if programs is None else next(p.program.example_inputs[1] for p in programs[0] if p.name == name)
            got, wanted = values.module(graphs[0].modules[name])(**given), graphs[1].modules[name](**given)
            assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_weight_that_two_graphs_read_is_evaluated_once(stored):
    real = Values().graphs(split(named_module(stored), torch.bfloat16))
    compute, forecast = (dict(real.modules[name].named_parameters()) for name in (COMPUTE, FORECAST))
    shared = compute.keys() & forecast.keys()
    assert shared
    assert all(compute[name] is forecast[name] for name in shared)


def test_what_is_stored_in_the_wanted_type_is_read_as_it_is(stored):
    weight = split(named_module(stored), torch.bfloat16).modules[COMPUTE].get_parameter("model.out.weight_bfloat16")
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
    with recording():
        made = nn.Parameter((weight + 1) * table, requires_grad=False)
    assert torch.equal(Values().of(made), (Values().of(weight) + 1) * table)


def test_a_weight_whose_making_was_not_seen_is_refused(stored):
    weight = named_module(stored).out.weight
    made = weight.detach() + 1
    with recording():
        (half, _) = weight.detach().chunk(2)
    for tensor in (made, half):
        with pytest.raises(PassError, match=r"a weight \[., 8\] torch.float32 has no value"):
            Values().of(tensor)
