"""What may be asked of a level, and how a budget is found for it."""

import math

import pytest

from cachec.compiler.methods import get_method
from cachec.compiler.options import ScheduleWish
from cachec.compiler.planning.goals import LEVELS, Goal, budget_for_speedup, make_goals, parse_levels, smallest_budget
from cachec.compiler.tables.schedule import Schedule, interval_for_budget, interval_schedule, uniform_schedule
from cachec.runtime.errors import InputError, QualityError


def method(name, **options):
    return get_method(name).with_options(options)


def goals(name, steps=50, **wish):
    return make_goals(method(name), steps, ScheduleWish(**wish))


def test_the_default_is_the_methods_own_interval():
    assert goals("taylor") == ((Goal(schedule=interval_schedule(50, 6)),), 6)
    assert goals("lesa")[0][0].schedule.compute == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)


def test_a_fitted_method_searches_by_default():
    (goal,), interval = goals("gram")
    assert (goal.searched, goal.budget, interval) == (True, len(interval_schedule(50, 7).compute), None)


def test_a_budget_is_searched_for_fitted_methods_and_spread_for_others():
    assert goals("gram", budget=8)[0] == (Goal(budget=8),)
    assert goals("taylor", budget=8)[0] == (Goal(schedule=uniform_schedule(50, 8)),)


@pytest.mark.parametrize("name", ["taylor", "gram", "adams", "reuse"])
def test_search_can_be_asked_for_by_name(name):
    assert goals(name, schedule="search", budget=7)[0] == (Goal(budget=7),)


def test_named_schedules():
    assert goals("gram", schedule="uniform", budget=8)[0][0].schedule == uniform_schedule(50, 8)
    assert goals("gram", schedule="interval", budget=8)[0][0].schedule == interval_for_budget(50, 8)
    assert goals("taylor", schedule="interval", interval=5) == ((Goal(schedule=interval_schedule(50, 5)),), 5)
    assert goals("gram", schedule="0,1,4")[0][0].schedule == Schedule(50, (0, 1, 4))


def test_levels_have_their_figures_or_given_ones():
    found = {goal.level: goal for goal in parse_levels("fine,high,fast=30.5,mine=22")}
    assert found["fine"].fine
    assert found["fine"].psnr is None
    assert (found["high"].psnr, found["fast"].psnr, found["mine"].psnr) == (LEVELS["high"], 30.5, 22.0)
    assert all(goal.searched for goal in found.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hihg", "Did you mean 'high'"),
        ("high,high", "there twice"),
        ("uncached=30", "reserved"),
        ("taylor=30", "reserved"),
        ("fine=40", "takes no PSNR"),
        ("lossless", "level lossless is called fine now"),
        ("high,lossless=40", "level lossless is called fine now"),
        ("fast=much", "'much'; it must be a PSNR in dB"),
        ("fast=-3", "above 0"),
        ("fast=nan", "above 0"),
        ("", "is not a name"),
        ("a/b=3", "is not a name"),
    ],
)
def test_bad_levels_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_levels(text)


@pytest.mark.parametrize(
    ("name", "wish", "message"),
    [
        ("gram", {"budget": 8, "levels": "high"}, "--budget and --levels contradict"),
        ("gram", {"target_psnr": 30.0, "target_speedup": 3.0}, "contradict each other"),
        ("taylor", {"interval": 51}, "interval is 51, but there are 50 steps: give at most 50"),
        ("taylor", {"interval": 5, "budget": 8}, "--interval and --budget contradict"),
        ("taylor", {"schedule": "0,1,2", "budget": 8}, "--schedule 0,1,2 and --budget contradict"),
        ("taylor", {"schedule": "serach"}, "Did you mean 'search'"),
        ("taylor", {"schedule": "0,x"}, "is not a list of steps"),
        ("taylor", {"schedule": "uniform"}, "needs --budget"),
        ("taylor", {"schedule": "uniform", "levels": "high"}, "needs --budget"),
        ("taylor", {"schedule": "search", "interval": 4}, "it takes --budget"),
        ("taylor", {"schedule": "interval", "target_psnr": 30.0}, "are searched"),
        ("gram", {"budget": 0}, "budget is 0; it must lie between 1"),
        ("gram", {"budget": 51}, "budget is 51; it must lie between 1 and the number of steps, 50"),
        ("taylor", {"budget": 51}, "budget is 51"),
        ("gram", {"target_psnr": -1.0}, "above 0"),
        ("gram", {"target_psnr": math.inf}, "above 0"),
        ("gram", {"target_speedup": 0.5}, "at least 1"),
        ("gram", {"target_speedup": 51.0}, "best reachable with 50 steps is 50"),
        ("taylor", {"schedule": "0,30"}, "too short: taylor needs 3"),
        ("taylor", {"budget": 2}, "budget is 2, but taylor needs 3 computed steps to start"),
        ("spectrum", {"budget": 4}, "spectrum needs 5"),
        ("lesa", {"levels": "high"}, "trained for one schedule"),
        ("lesa", {"target_psnr": 30.0}, "trained for one schedule"),
        ("lesa", {"schedule": "search"}, "trained for one schedule"),
    ],
)
def test_what_contradicts_or_is_out_of_range_is_refused(name, wish, message):
    with pytest.raises(InputError, match=message):
        goals(name, **wish)


@pytest.mark.parametrize("needed", [1, 2, 3, 17, 32, 49, 50])
def test_the_smallest_budget_is_found(needed):
    asked = []

    def psnr(budget):
        asked.append(budget)
        return 50.0 if budget >= needed else 20.0

    assert smallest_budget(psnr, 40.0, 1, 50) == needed
    assert len(asked) <= 13
    assert len(set(asked)) == len(asked)


def test_a_target_out_of_reach_names_the_best():
    with pytest.raises(QualityError, match=r"no level reaches 60\.00 dB: the best reachable is 50\.00 dB"):
        smallest_budget(lambda budget: float(budget), 60.0, 1, 50)


@pytest.mark.parametrize("cost", [0.0, 0.03, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("wanted", [1.0, 1.7, 2.0])
def test_the_budget_for_a_speed_up_is_the_largest_that_is_fast_enough(cost, wanted):
    def speedup(budget):
        return 50 / (budget + (50 - budget) * cost)

    found = budget_for_speedup(wanted, 50, cost) if speedup(1) >= wanted else None
    if found is not None:
        assert speedup(found) >= wanted - 1e-9
        assert found == 50 or speedup(found + 1) < wanted


def test_a_speed_up_that_forecasts_forbid_names_the_best():
    with pytest.raises(QualityError, match=r"target-speedup is 10, but the best reachable is 4\.63"):
        budget_for_speedup(10.0, 50, 0.2)


def test_a_speed_up_below_the_warm_up_is_refused():
    assert budget_for_speedup(10.0, 50, 0.0, least=5) == 5
    with pytest.raises(QualityError, match=r"best reachable is 10\.00: computed steps are 5 at least"):
        budget_for_speedup(11.0, 50, 0.0, least=5)
