"""The lists of passes, as wholes."""

import pytest
import torch
from small_models import BODIES, capture, expect_equal
from toy_bundle import IO

import cachec.passes
from cachec.compiler.graphs.prepare import linear
from cachec.passes import Stage, canonical_passes, engine_passes, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST, PROLOGUE


def test_all_that_the_room_offers_is_there():
    assert [name for name in cachec.passes.__all__ if not hasattr(cachec.passes, name)] == []


def test_passes_say_that_they_changed_something(toy_split):
    told = {}
    watch = [lambda index, one, result: told.setdefault(one.name, result.changed)]
    run_passes(linear(toy_split, observers=watch), [engine_passes(IO, Stage.LINEAR, slots=torch.float16)], observers=watch)
    assert {name for name, changed in told.items() if not changed} <= {"prune"}  # others leave little to it


@pytest.mark.parametrize("hoist", ["none", "tables", "all"])
def test_engine_passes_leave_graphs_that_export_and_read_everything(linear_graphs, hoist):
    graphs = run_passes(linear_graphs, [engine_passes(IO, Stage.LINEAR, hoist=hoist)])
    assert set(graphs.modules) == {COMPUTE, FORECAST, ADVANCE, *([PROLOGUE] if hoist == "all" else [])}
    for name, module in graphs.modules.items():
        for node in placeholders(module).values():
            assert node.users, f"{name} does not read {node}"


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_all_passes_together_keep_the_result_exactly(body):
    expect_equal(run_passes(capture(body), [canonical_passes()]), body)
