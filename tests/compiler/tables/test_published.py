import pytest

from cachec.compiler.tables.published import PUBLISHED
from cachec.compiler.tables.schedule import Schedule, parse_schedule
from cachec.runtime.errors import InputError


def test_published_schedules_are_schedules_that_compute_what_their_names_say():
    counts = {"slow": 18, "medium": 15, "fast": 11, "ultra": 8}  # of 28, as cache-dit says
    for name, (steps, computed) in PUBLISHED.items():
        assert parse_schedule(name, steps) == Schedule(steps, computed)
        number = name.rpartition("-")[2]
        if name.startswith("cache-dit"):
            assert (steps, len(computed)) == (28, counts[number])
        elif not name.startswith("l2p"):
            assert len(computed) == int(number)
    assert PUBLISHED["cache-dit-ultra"][1] == (0, 1, 2, 3, 6, 12, 19, 27)


def test_one_for_another_number_of_steps_is_refused():
    with pytest.raises(InputError, match="schedule disca-8 was published for 20 steps, and 50 are asked for: give --steps 20"):
        parse_schedule("disca-8", 50)
