"""What stands where a module was, and what it lets pass."""

import pickle

import pytest
import torch
from diffusers import ModelMixin
from torch import nn

from cachec.compiler.stand_in import StandIn
from cachec.runtime.errors import InputError


class Original(ModelMixin):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.scale = 2.0

    def enable_cache(self, config):
        raise AssertionError("it must not be reached")


@pytest.fixture
def stand_in():
    return StandIn(Original())


def test_attributes_are_those_of_the_original(stand_in):
    assert stand_in.scale == 2.0
    assert stand_in.linear is stand_in.original.linear
    assert stand_in.num_parameters() == 9
    assert stand_in.state_dict().keys() == {"linear.weight", "linear.bias"}
    assert not hasattr(stand_in, "nothing")


@pytest.mark.parametrize("name", ["enable_cache", "save_pretrained", "load_state_dict", "compile", "set_attention_backend"])
def test_methods_are_refused_by_name(stand_in, name):
    with pytest.raises(InputError, match=rf"{name}\(\) has no effect on an accelerated transformer"):
        getattr(stand_in, name)("anything")


@pytest.mark.parametrize("name", ["linear", "scale"])
def test_what_belongs_on_the_original_cannot_be_set(stand_in, name):
    with pytest.raises(InputError, match=f"{name} of an accelerated transformer cannot be set"):
        setattr(stand_in, name, None)


def test_something_of_its_own_can(stand_in):
    stand_in.note = "mine"
    assert stand_in.note == "mine"


def test_it_moves_nowhere(stand_in):
    assert stand_in.to("cpu", torch.float32) is stand_in.float() is stand_in.eval() is stand_in.requires_grad_(False)
    for move in (stand_in.half, stand_in.double, lambda: stand_in.to("meta")):
        with pytest.raises(InputError, match="stays torch.float32 on cpu and cannot go to"):
            move()
    with pytest.raises(InputError, match="train"):
        stand_in.train()
    assert {parameter.dtype for parameter in stand_in.original.parameters()} == {torch.float32}


def test_it_is_not_pickled(stand_in):
    with pytest.raises(InputError, match="cannot be pickled or copied"):
        pickle.dumps(stand_in)
