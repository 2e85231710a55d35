"""Filling a mask becomes logic."""

import pytest
import torch
from small_models import (
    capture,
    fill_false,
    fill_true,
    leaves_its_input_alone,
    rewrites_once_and_keeps_the_result_exactly,
    run_one,
    says_that_there_is_nothing_to_do,
    targets,
)

from cachec.passes import RewriteBoolMaskedFill

aten = torch.ops.aten

REWRITES = [
    (fill_true, aten.masked_fill.Scalar, aten.logical_or.default),
    (fill_false, aten.masked_fill.Scalar, aten.logical_and.default),
]


@pytest.mark.parametrize(("body", "gone", "present"), REWRITES, ids=["fill_true", "fill_false"])
def test_it_rewrites_once_and_keeps_the_result_exactly(body, gone, present):
    rewrites_once_and_keeps_the_result_exactly(RewriteBoolMaskedFill(), body, gone, present)


@pytest.mark.parametrize(("body", "gone", "present"), REWRITES, ids=["fill_true", "fill_false"])
def test_it_leaves_its_input_alone(body, gone, present):
    leaves_its_input_alone(RewriteBoolMaskedFill(), body, gone)


def test_without_anything_to_do_it_says_so():
    says_that_there_is_nothing_to_do(RewriteBoolMaskedFill())


def test_masked_fill_on_numbers_stays():
    graphs, changed = run_one(capture(lambda tiny, x, y: x.masked_fill(y > 0, 3.0)), RewriteBoolMaskedFill())
    assert not changed
    assert aten.masked_fill.Scalar in targets(graphs)
