import numpy as np
from toy_tables import SCHEDULES, TWO, check_exact, check_recursion, sigmas_of, table_of

from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.tables.coefficients import collapse


def reuse(method, features, schedule):
    return {step: features[max(s for s in schedule.compute if s < step)] for step in schedule.forecast}


def test_reuse_repeats_the_last_computed_feature():
    check_recursion(Reuse(), reuse, schedules=TWO)
    check_exact(Reuse(), 0, 1, schedules=TWO)


def test_reuse_of_velocities_is_euler_on_the_computed_steps():
    for schedule in map(SCHEDULES.get, TWO):
        got = collapse(table_of(Reuse(), schedule), sigmas_of(schedule.num_steps))
        np.testing.assert_allclose(got.coefficients, table_of(Adams(1), schedule).coefficients, atol=1e-12)
