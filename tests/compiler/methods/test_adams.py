from collections import deque

import numpy as np
import pytest
from numpy.polynomial import Polynomial
from toy_tables import SCHEDULES, SIZE, sigmas_of, table_of

from cachec.compiler.methods.adams import Adams
from cachec.runtime.errors import InputError


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_in_sigma_are_moved_exactly_past_its_start(order):
    for schedule in SCHEDULES.values():
        sigmas = sigmas_of(schedule.num_steps)
        velocity = Polynomial(np.random.default_rng(order).standard_normal(order))
        nodes = np.array([*sigmas[list(schedule.compute)], sigmas[-1]])
        positions = table_of(Adams(order), schedule).coefficients @ velocity(nodes[:-1])
        moved, exact = np.diff(np.concatenate([[0.0], positions])), np.diff(velocity.integ()(nodes))
        np.testing.assert_allclose(moved[order - 1 :], exact[order - 1 :], atol=1e-10)


def test_order_2_is_the_integral_of_the_line_through_two_velocities():
    for schedule in SCHEDULES.values():
        sigmas, order = sigmas_of(schedule.num_steps), 2
        velocities = np.random.default_rng(0).standard_normal((schedule.num_steps, SIZE))
        nodes, x, expected = deque(maxlen=order), np.zeros(SIZE), []
        for step, end in zip(schedule.compute, [*schedule.compute[1:], schedule.num_steps], strict=True):
            nodes.append(step)
            gap = sigmas[end] - sigmas[step]
            x = x + gap * velocities[step]
            if len(nodes) > 1:
                slope = (velocities[step] - velocities[nodes[0]]) / (sigmas[step] - sigmas[nodes[0]])
                x = x + gap**2 / 2 * slope
            expected.append(x)
        got = table_of(Adams(order), schedule).coefficients @ velocities[list(schedule.compute)]
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("order", [0, 5])
def test_an_order_out_of_range_is_refused(order):
    with pytest.raises(InputError, match=f"order is {order}; adams takes 1 to 4"):
        Adams(order)
