"""Checks that the graph makes while it runs go."""

import torch
from small_models import leaves_its_input_alone, rewrites_once_and_keeps_the_result_exactly, squeeze

from cachec.passes import DropAsserts

aten = torch.ops.aten


def test_it_rewrites_once_and_keeps_the_result_exactly():
    rewrites_once_and_keeps_the_result_exactly(DropAsserts(), squeeze, aten._assert_tensor_metadata.default, None)


def test_it_leaves_its_input_alone():
    leaves_its_input_alone(DropAsserts(), squeeze, aten._assert_tensor_metadata.default)
