import math

import pytest
from toy_tables import check_exact, check_recursion, differences_by_step

from cachec.compiler.methods.hicache import HiCache
from cachec.compiler.tables.schedule import interval_schedule
from cachec.runtime.errors import InputError


def hicache(method, features, schedule):
    def polynomial(n, x):  # the physicists' recurrence
        return [1.0, 2 * x][n] if n < 2 else 2 * x * polynomial(n - 1, x) - 2 * (n - 1) * polynomial(n - 2, x)

    return {
        step: sum(d / math.factorial(i) * method.sigma**i * polynomial(i, method.sigma * (step - at)) for i, d in state.items())
        for step, state, at in differences_by_step(features, schedule, method.order)
        if step not in schedule.compute
    }


@pytest.mark.parametrize("sigma", [0.5, 0.71])
@pytest.mark.parametrize("order", range(4))
def test_hicache_is_its_formula_and_exact_on_constants(order, sigma):
    check_recursion(HiCache(order, sigma), hicache)
    check_exact(HiCache(order, sigma), 0, 1)


def test_its_schedule_is_the_counter_rule():
    assert HiCache().interval(50, 7) == interval_schedule(50, 7)


@pytest.mark.parametrize(
    ("options", "message"), [((9, 0.5), "order is 9; hicache"), ((2, 0.0), "sigma is 0.0"), ((2, 1.5), "sigma is 1.5")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HiCache(*options)
