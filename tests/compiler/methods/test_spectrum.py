import math

import numpy as np
import pytest
from numpy.polynomial import Chebyshev
from toy_tables import SIZE, check_exact, check_recursion

from cachec.compiler.methods.spectrum import Spectrum, spectrum_schedule
from cachec.runtime.errors import InputError


def spectrum(method, features, schedule):
    """Coefficients of every element by ridge regression (as least squares with extra rows), then the value."""
    result, history = {}, []
    half = schedule.num_steps / 2
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.append((step, features[step]))
            continue
        design = np.array([[Chebyshev.basis(n)((s - half) / half) for n in range(method.degree + 1)] for s, _ in history])
        extra = math.sqrt(method.ridge) * np.eye(method.degree + 1)
        known = np.concatenate([[f for _, f in history], np.zeros((method.degree + 1, SIZE))])
        coefficients = np.linalg.lstsq(np.concatenate([design, extra]), known, rcond=None)[0]
        fitted = np.array([Chebyshev(column)((step - half) / half) for column in coefficients.T])
        s, linear = history[-1]
        if len(history) > 1:
            linear = linear + (step - s) * (linear - history[-2][1]) / (s - history[-2][0])
        result[step] = method.blend * fitted + (1 - method.blend) * linear
    return result


@pytest.mark.parametrize("options", [(4, 0.1, 1.0), (4, 0.1, 0.5), (2, 1e-3, 0.0)])
def test_spectrum_is_ridge_regression_written_out(options):
    check_recursion(Spectrum(*options), spectrum)


def test_its_linear_part_is_exact_on_lines():
    check_exact(Spectrum(blend=0.0), 1, 2)


PUBLISHED_WINDOWS = {
    0.75: (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46),
    3.0: (0, 1, 2, 3, 4, 6, 11, 19, 30, 44),
}


@pytest.mark.parametrize("alpha", PUBLISHED_WINDOWS)
def test_windows_are_the_published_ones(alpha):
    assert spectrum_schedule(50, alpha=alpha).compute == PUBLISHED_WINDOWS[alpha]
    assert spectrum_schedule(50, budget=len(PUBLISHED_WINDOWS[alpha])).compute == PUBLISHED_WINDOWS[alpha]


def test_intervals_of_4_and_6_are_the_published_lists():
    assert Spectrum().interval(50, 6).compute == PUBLISHED_WINDOWS[3.0]
    assert Spectrum().interval(50, 4).compute == PUBLISHED_WINDOWS[0.75]


@pytest.mark.parametrize(("num_steps", "budgets"), [(50, range(6, 28)), (28, range(6, 17)), (4, [4])])
def test_a_growth_is_found_for_a_budget(num_steps, budgets):
    for budget in budgets:
        schedule = spectrum_schedule(num_steps, budget=budget)
        assert len(schedule.compute) == budget
        gaps = [b - a for a, b in zip(schedule.compute[4:], schedule.compute[5:], strict=False)]
        assert gaps == sorted(gaps)


@pytest.mark.parametrize("budget", [5, 28])
def test_a_budget_that_no_window_has_is_refused(budget):
    with pytest.raises(InputError, match="they have 6 to 27"):
        spectrum_schedule(50, budget=budget)


def test_shrinking_windows_are_refused():
    with pytest.raises(InputError, match="alpha is -1"):
        spectrum_schedule(50, alpha=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 17}, "degree is 17"),
        ({"ridge": 0.0}, "ridge is 0.0; spectrum takes more than 0"),
        ({"blend": 1.1}, "blend is 1.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Spectrum(**options)
