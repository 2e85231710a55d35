"""Initializers that are read late have the bytes of the weights that they stand for."""

from functools import partial

import onnx_ir
import pytest
import torch
from onnx_ir import DataType
from safetensors.torch import save_file
from toy import ToyDiT

from cachec.compiler.graphs.weights import Values, named_module
from cachec.compiler.models.shards import Stored
from cachec.engines.onnx_weights import LateWeight, contents, identity

NAME = "blocks.0.modulation.weight"


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A weight of the toy that is on disk only."""
    path = tmp_path_factory.mktemp("weights") / "toy.safetensors"
    save_file(ToyDiT().state_dict(), path)
    return named_module(Stored.open(partial(ToyDiT, head_axis=False), [path], "config.json")).get_parameter(NAME)


def read(tensor):
    return b"".join(bytes(content) for content in contents(tensor))


def test_bytes_are_those_on_disk_in_the_order_of_the_axes(fake):
    wanted, late = ToyDiT().get_parameter(NAME).detach(), LateWeight(fake, Values(), DataType.FLOAT, NAME)
    turned = late.transposed((1, 0))
    assert list(turned.shape) == list(wanted.T.shape) != list(late.shape)
    assert read(late) == wanted.numpy().tobytes()
    assert read(turned) == turned.tobytes() == wanted.T.contiguous().numpy().tobytes()
    assert read(turned.transposed((1, 0))) == read(late)


def test_equal_values_have_one_identity(fake):
    values = Values()
    first, second = (LateWeight(fake, values, DataType.FLOAT, name) for name in ("a", "b"))
    assert identity(first) == identity(second) != identity(first.transposed((1, 0)))
    here = [onnx_ir.tensor(torch.full((2,), number).numpy()) for number in (1.0, 1.0, 2.0)]
    assert identity(here[0]) == identity(here[1]) != identity(here[2])
