"""A cast to another tensor's type becomes one to a type."""

import torch
from small_models import (
    capture,
    leaves_its_input_alone,
    rewrites_once_and_keeps_the_result_exactly,
    says_that_there_is_nothing_to_do,
    type_as,
)

from cachec.passes import DropAsserts, ReplaceTypeAs, SimplifyShapes, run_passes
from cachec.runtime.abi import MODEL

aten = torch.ops.aten


def test_it_rewrites_once_and_keeps_the_result_exactly():
    rewrites_once_and_keeps_the_result_exactly(ReplaceTypeAs(), type_as, aten.type_as.default, None)


def test_it_leaves_its_input_alone():
    leaves_its_input_alone(ReplaceTypeAs(), type_as, aten.type_as.default)


def test_without_anything_to_do_it_says_so():
    says_that_there_is_nothing_to_do(ReplaceTypeAs())


def test_the_cast_no_longer_depends_on_the_other_tensor():
    graphs = run_passes(capture(type_as), [DropAsserts(), ReplaceTypeAs(), SimplifyShapes()])
    y = next(n for n in graphs.modules[MODEL].graph.nodes if n.op == "placeholder" and n.target == "y")
    assert not y.users
