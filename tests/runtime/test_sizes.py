import pytest

from cachec.runtime.build_options import SizeRange
from cachec.runtime.errors import InputError
from cachec.runtime.sizes import check_max_batch, size_ranges


def test_ranges_of_symbolic_sizes():
    ranges = size_ranges(50, 10, max_batch=4)
    assert ranges == {
        "batch": SizeRange(1, 4, 4),
        "slots": SizeRange(1, 10, 50),
        "forecasts": SizeRange(1, 4, 49),
        "compute_steps": SizeRange(1, 10, 50),
        "compute_2_steps": SizeRange(1, 10, 50),
        "forecast_steps": SizeRange(1, 40, 50),
    }
    assert size_ranges(50, 10, batch=3)["batch"] == SizeRange(3, 3, 3)
    assert size_ranges(50, 10, batch=3, guided=True)["batch"] == SizeRange(3, 6, 6)
    assert size_ranges(50, 10, max_batch=2, guided=True)["batch"] == SizeRange(1, 4, 4)


@pytest.mark.parametrize(("steps", "computed"), [(1, 1), (1, 0), (2, 9), (4, 4)])
def test_no_range_is_empty(steps, computed):
    assert all(1 <= one.least <= one.usual <= one.most for one in size_ranges(steps, computed).values())


def test_batches_that_graphs_cannot_take_are_refused():
    check_max_batch(1)
    check_max_batch(1024)
    for batch in (0, 1025):
        with pytest.raises(InputError, match=f"max-batch is {batch}; it must be from 1 to 1024"):
            check_max_batch(batch)
