"""Masks of attention have the size of the scores."""

import torch
from small_models import (
    attend,
    leaves_its_input_alone,
    rewrites_once_and_keeps_the_result_exactly,
    says_that_there_is_nothing_to_do,
)

from cachec.passes import ExpandAttentionMasks

aten = torch.ops.aten


def test_it_rewrites_once_and_keeps_the_result_exactly():
    rewrites_once_and_keeps_the_result_exactly(ExpandAttentionMasks(), attend, None, aten.expand.default)


def test_it_leaves_its_input_alone():
    leaves_its_input_alone(ExpandAttentionMasks(), attend, None)


def test_without_anything_to_do_it_says_so():
    says_that_there_is_nothing_to_do(ExpandAttentionMasks())
