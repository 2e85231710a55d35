import pytest

from cachec.compiler.methods.l2p import l2p_schedule
from cachec.compiler.methods.spectrum import spectrum_schedule
from cachec.compiler.tables.schedule import (
    Schedule,
    interval_for_budget,
    interval_schedule,
    parse_schedule,
    uniform_schedule,
)
from cachec.runtime.errors import InputError


def published_rule(num_steps: int, interval: int, warmup: int) -> list[int]:
    """The counter of the released code, written out."""
    computed, counter = [], 0
    for step in range(num_steps):
        if step < warmup or counter == interval - 1:
            computed.append(step)
            counter = 0
        else:
            counter += 1
    return computed


@pytest.mark.parametrize("interval", range(1, 12))
@pytest.mark.parametrize("num_steps", [4, 28, 50])
def test_interval_follows_the_published_counter(num_steps, interval):
    assert list(interval_schedule(num_steps, interval).compute) == published_rule(num_steps, interval, 3)


def test_lesa_at_interval_7_computes_the_ten_published_steps():
    assert interval_schedule(50, 7, extra=(3,)).compute == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


@pytest.mark.parametrize("budget", range(1, 51))
def test_uniform_spends_its_budget_and_starts_with_the_first_three(budget):
    schedule = uniform_schedule(50, budget)
    assert len(schedule.compute) == budget
    assert schedule.compute[:3] == (0, 1, 2)[:budget]


def test_history_of_computed_steps_repeats_the_oldest_entry():
    assert Schedule(10, (0, 1, 5)).history(3, 4, feeds_back=False) == (1, 0, 0, 0)


def test_history_that_feeds_back_holds_every_step():
    assert Schedule(10, (0, 1, 5)).history(4, 3, feeds_back=True) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "must start at step 0"),
        ("0,3,2", "must be sorted"),
        ("0,2,2", "must be sorted"),
        ("0,1,50", "computes step 50"),
        ("0,x", "not a list of steps"),
        ("", "not a list of steps"),
    ],
)
def test_impossible_schedules_are_refused_with_the_reason(text, message):
    with pytest.raises(InputError, match=message):
        parse_schedule(text, 50)


@pytest.mark.parametrize("interval", [0, -3])
def test_interval_below_one_is_refused(interval):
    with pytest.raises(InputError, match=f"interval is {interval}"):
        interval_schedule(50, interval)


@pytest.mark.parametrize("budget", [0, 51])
def test_budget_out_of_range_is_refused(budget):
    with pytest.raises(InputError, match=f"budget is {budget}"):
        uniform_schedule(50, budget)


def test_no_steps_are_refused():
    with pytest.raises(InputError, match="steps is 0"):
        Schedule(0, (0,))


@pytest.mark.parametrize("extra", [(), (3,)])
@pytest.mark.parametrize("budget", range(4, 51))
def test_interval_for_budget_takes_the_smallest_interval_that_fits(budget, extra):
    sizes = [len(interval_schedule(50, interval, extra=extra).compute) for interval in range(1, 51)]
    schedule = interval_for_budget(50, budget, extra)
    smallest = next(interval for interval, size in enumerate(sizes, start=1) if size <= budget)
    assert schedule == interval_schedule(50, smallest, extra=extra)


def test_a_budget_below_the_warm_up_is_refused():
    with pytest.raises(InputError, match="budget is 2; an interval schedule of 50 steps has at least 3"):
        interval_for_budget(50, 2)


@pytest.mark.parametrize(
    ("budget", "last"),
    [(11, (30, 37, 44)), (10, (31, 38, 45)), (9, (26, 35, 43)), (8, (20, 31, 41)), (7, (12, 24, 38)), (6, (4, 16, 32))],
)
def test_l2p_lists_have_their_budget(budget, last):
    schedule = l2p_schedule(50, budget)
    assert len(schedule.compute) == budget
    assert schedule.compute[:3] + schedule.compute[-3:] == (0, 1, 2, *last)


@pytest.mark.parametrize(("num_steps", "budget"), [(50, 5), (50, 12), (28, 8)])
def test_l2p_without_a_list_is_refused_with_what_there_is(num_steps, budget):
    with pytest.raises(InputError, match="50 steps, with 6, 7, 8, 9, 10, 11 of them"):
        l2p_schedule(num_steps, budget)


PUBLISHED_WINDOWS = {
    0.75: (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46),
    3.0: (0, 1, 2, 3, 4, 6, 11, 19, 30, 44),
}


@pytest.mark.parametrize("alpha", PUBLISHED_WINDOWS)
def test_spectrum_windows_are_the_published_ones(alpha):
    assert spectrum_schedule(50, alpha=alpha).compute == PUBLISHED_WINDOWS[alpha]
    assert spectrum_schedule(50, budget=len(PUBLISHED_WINDOWS[alpha])).compute == PUBLISHED_WINDOWS[alpha]


@pytest.mark.parametrize(("num_steps", "budgets"), [(50, range(6, 28)), (28, range(6, 17)), (4, [4])])
def test_spectrum_finds_a_growth_for_a_budget(num_steps, budgets):
    for budget in budgets:
        schedule = spectrum_schedule(num_steps, budget=budget)
        assert len(schedule.compute) == budget
        gaps = [b - a for a, b in zip(schedule.compute[4:], schedule.compute[5:], strict=False)]
        assert gaps == sorted(gaps)


@pytest.mark.parametrize("budget", [5, 28])
def test_spectrum_refuses_a_budget_that_no_window_has(budget):
    with pytest.raises(InputError, match="they have 6 to 27"):
        spectrum_schedule(50, budget=budget)


def test_spectrum_refuses_shrinking_windows():
    with pytest.raises(InputError, match="alpha is -1"):
        spectrum_schedule(50, alpha=-1)
