import math

import pytest
from toy_tables import TWO, check_exact, check_recursion, differences_by_step

from cachec.compiler.methods.taylor import Taylor
from cachec.runtime.errors import InputError


def taylor(method, features, schedule):
    return {
        step: sum(d * (step - at) ** i / math.factorial(i) for i, d in state.items())
        for step, state, at in differences_by_step(features, schedule, method.order)
        if step not in schedule.compute
    }


@pytest.mark.parametrize("order", [0, 1, 3])
def test_taylor_is_the_released_recursion_and_exact_on_lines(order):
    check_recursion(Taylor(order), taylor, rtol=1e-4, schedules=TWO)
    check_exact(Taylor(order), min(order, 1), 3 if order else 1, atol=1e-4, schedules=TWO)


def test_an_order_out_of_range_is_refused():
    with pytest.raises(InputError, match="order is 99; taylor takes 0 to 8"):
        Taylor(99)
