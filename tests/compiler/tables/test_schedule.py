from itertools import pairwise

import pytest

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


@pytest.mark.parametrize("num_steps", [4, 28, 50])
def test_interval_follows_the_published_counter(num_steps):
    for interval in range(1, 12):
        assert list(interval_schedule(num_steps, interval).compute) == published_rule(num_steps, interval, 3)


def test_lesa_at_interval_7_computes_the_ten_published_steps():
    assert interval_schedule(50, 7, extra=(3,)).compute == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


def test_uniform_spends_its_budget_evenly_behind_the_first_three():
    for budget in range(1, 51):
        schedule = uniform_schedule(50, budget)
        assert len(schedule.compute) == budget
        assert schedule.compute[:3] == (0, 1, 2)[:budget]
        gaps = [b - a for a, b in pairwise([*schedule.compute[2:], 50])]
        assert not gaps or max(gaps) - min(gaps) <= 1


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
def test_interval_for_budget_takes_the_smallest_interval_that_fits(extra):
    sizes = [len(interval_schedule(50, interval, extra=extra).compute) for interval in range(1, 51)]
    for budget in range(4, 51):
        smallest = next(interval for interval, size in enumerate(sizes, start=1) if size <= budget)
        assert interval_for_budget(50, budget, extra) == interval_schedule(50, smallest, extra=extra)


def test_a_budget_below_the_warm_up_is_refused():
    with pytest.raises(InputError, match="budget is 2; an interval schedule of 50 steps has at least 3"):
        interval_for_budget(50, 2)
