from collections import deque

import pytest
from toy_tables import check_exact, check_recursion

from cachec.compiler.methods.newton import Newton
from cachec.runtime.errors import InputError


def newton(method, features, schedule):
    """Divided differences, the triangle and Horner's rule."""
    result, history = {}, deque(maxlen=method.order + 1)
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.appendleft((step, features[step]))
            continue
        nodes, column = [s for s, _ in history], [f for _, f in history]
        heads = [column[0]]
        for level in range(1, len(nodes)):
            column = [(column[j] - column[j + 1]) / (nodes[j] - nodes[j + level]) for j in range(len(column) - 1)]
            heads.append(column[0])
        value = heads[-1]
        for level in range(len(heads) - 2, -1, -1):
            value = heads[level] + (step - nodes[level]) * value
        result[step] = value
    return result


@pytest.mark.parametrize("order", range(5))
def test_newton_is_its_triangle_and_exact_on_polynomials_of_its_order(order):
    check_recursion(Newton(order), newton)
    check_exact(Newton(order), order, order + 1)


@pytest.mark.parametrize("order", [9, -1])
def test_an_order_out_of_range_is_refused(order):
    with pytest.raises(InputError, match=f"order is {order}; newton takes 0 to 8"):
        Newton(order)
