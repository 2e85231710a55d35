"""What depends on no input and on no parameter is computed ahead."""

import torch
from small_models import (
    Tiny,
    capture,
    constants,
    leaves_its_input_alone,
    make_inputs,
    rewrites_once_and_keeps_the_result_exactly,
    run_one,
    says_that_there_is_nothing_to_do,
    targets,
)

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import FoldConstants
from cachec.runtime.abi import MODEL

aten = torch.ops.aten


def test_it_rewrites_once_and_keeps_the_result_exactly():
    rewrites_once_and_keeps_the_result_exactly(FoldConstants(), constants, aten.sin.default, "constant_0")


def test_it_leaves_its_input_alone():
    leaves_its_input_alone(FoldConstants(), constants, aten.sin.default)


def test_without_anything_to_do_it_says_so():
    says_that_there_is_nothing_to_do(FoldConstants())


def test_values_of_parameters_are_not_folded():
    graphs, changed = run_one(capture(lambda tiny, x, y: x + torch.sin(tiny.out.bias)), FoldConstants())
    assert not changed
    assert aten.sin.default in targets(graphs)


def test_folding_keeps_parameters_the_same_objects():
    tiny = Tiny(constants).eval()
    graphs, _ = run_one(capture_model(tiny, make_inputs()), FoldConstants())
    assert {id(p) for p in graphs.modules[MODEL].parameters()} == {id(p) for p in tiny.parameters()}


def test_a_table_that_is_split_is_folded_too():
    def model(tiny, x, y):
        first, second = torch.sin(torch.arange(16.0).reshape(2, 8)).split([3, 5], dim=1)
        return x + torch.cat([first, second], dim=1)[0]

    graphs, changed = run_one(capture(model), FoldConstants())
    assert changed
    assert aten.sin.default not in targets(graphs)
