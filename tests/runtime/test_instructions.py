import json

import pytest

from cachec.runtime.abi import ADVANCE, COMPUTE, FEATURE, FORECAST, VELOCITY
from cachec.runtime.errors import BundleError
from cachec.runtime.instructions import Advance, Compute, Forecast, Predict, check_known, read_instruction


def test_instructions_say_what_they_do():
    compute, forecast, predict, advance = Compute(3, 1), Forecast((4, 5), 2), Predict(6, (1, 0), 2), Advance((0, 1), 1)
    assert [one.graph for one in (compute, forecast, predict, advance)] == [COMPUTE, FORECAST, FORECAST, ADVANCE]
    assert [one.steps for one in (compute, forecast, predict, advance)] == [(3,), (4, 5), (6,), (0, 1)]
    assert [one.computes for one in (compute, forecast, predict, advance)] == [True, False, False, False]
    assert [one.reads for one in (compute, forecast, predict, advance)] == [
        {}, {FEATURE: (0, 1)}, {FEATURE: (1, 0)}, {VELOCITY: (0,)},
    ]  # fmt: skip
    assert [one.writes for one in (compute, forecast, predict, advance)] == [{FEATURE: (1,)}, {}, {FEATURE: (2,)}, {}]
    assert [one.rows for one in (compute, forecast, predict, advance)] == [(), (4, 5), (), (0,)]
    assert [one.moves for one in (compute, forecast, predict, advance)] == [(3,), (4, 5), (6,), (0, 1)]
    assert (Compute(3, 1, VELOCITY).moves, Compute(3, 1, VELOCITY).writes, Compute(3).writes) == ((), {VELOCITY: (1,)}, {})
    assert Compute(3, graph="unguided").graph == "unguided"


@pytest.mark.parametrize(
    "one", [Compute(3, None, VELOCITY, "unguided"), Forecast((4, 5), 2), Predict(6, (1, 0)), Advance((0,), 1)]
)
def test_instructions_survive_json(one):
    assert read_instruction(json.loads(json.dumps({"op": one.op, **vars(one)}))) == one


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Compute("0"), "does not read as an instruction"),
        (Compute(0, True), "does not read as an instruction"),
        (Compute(0, graph=7), "does not read as an instruction"),
        (Forecast((0.5,), 1), "does not read as an instruction"),
        (Predict(1, (0, 2), 2), r"steps \(1,\) write feature slot 2, which they read"),
    ],
)
def test_numbers_that_are_none_are_refused(one, message):
    with pytest.raises(BundleError, match=message):
        one.check()


def test_unknown_words_are_refused():
    check_known({"op": 1}, {"op", "step"}, "it")
    with pytest.raises(BundleError, match=r"program: it says \['branch', 'colour'\], which this cachec does not know"):
        check_known({"op": 1, "colour": 2, "branch": 3}, {"op"}, "it")
    with pytest.raises(
        BundleError, match="no instruction 'guess'; known are compute, compute-positive, forecast, predict, advance"
    ):
        read_instruction({"op": "guess"})
