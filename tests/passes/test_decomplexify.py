"""Rotations of complex numbers become arithmetic on pairs of real ones."""

import pytest
import torch
from small_models import (
    as_complex,
    capture,
    leaves_its_input_alone,
    rewrites_once_and_keeps_the_result_exactly,
    rotate,
    rotate_from_left,
    run_one,
    says_that_there_is_nothing_to_do,
)

from cachec.passes import Decomplexify, canonical_passes, run_passes
from cachec.passes.base import depends_on_inputs
from cachec.runtime.abi import MODEL
from cachec.runtime.errors import PassError

aten = torch.ops.aten

REWRITES = [
    (rotate, aten.view_as_complex.default, aten.stack.default),
    (rotate_from_left, aten.view_as_complex.default, aten.stack.default),
]


@pytest.mark.parametrize(("body", "gone", "present"), REWRITES, ids=["rotate", "rotate_from_left"])
def test_it_rewrites_once_and_keeps_the_result_exactly(body, gone, present):
    rewrites_once_and_keeps_the_result_exactly(Decomplexify(), body, gone, present)


@pytest.mark.parametrize(("body", "gone", "present"), REWRITES, ids=["rotate", "rotate_from_left"])
def test_it_leaves_its_input_alone(body, gone, present):
    leaves_its_input_alone(Decomplexify(), body, gone)


def test_without_anything_to_do_it_says_so():
    says_that_there_is_nothing_to_do(Decomplexify())


def has_tensor(node):
    return isinstance(node.meta.get("val"), torch.Tensor)


def test_no_complex_value_depends_on_an_input_any_more():
    graphs, _ = run_one(capture(rotate), Decomplexify())
    assert not any(n.meta["val"].is_complex() for n in depends_on_inputs(graphs.modules[MODEL]) if has_tensor(n))


def test_folding_after_decomplexify_leaves_no_complex_value_in_the_graph():
    graphs = run_passes(capture(rotate), [canonical_passes()])
    assert not any(n.meta["val"].is_complex() for n in graphs.modules[MODEL].graph.nodes if has_tensor(n))


@pytest.mark.parametrize(
    "body",
    [
        lambda tiny, x, y: torch.view_as_real(as_complex(x) * as_complex(y)).flatten(2),
        lambda tiny, x, y: as_complex(x).abs().repeat(1, 1, 2),
    ],
    ids=["product of inputs", "absolute value"],
)
def test_other_complex_values_of_inputs_are_refused(body):
    with pytest.raises(PassError, match="decomplexify.*computes a complex number, which ONNX cannot express"):
        run_one(capture(body), Decomplexify())
