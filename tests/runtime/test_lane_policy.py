"""Orders, widths and rosters, on costs that were made up."""

from dataclasses import replace

import pytest

from cachec.runtime.errors import InputError
from cachec.runtime.lane_costs import Costs, Meeting, groups_of
from cachec.runtime.lane_policy import (
    Job,
    Kind,
    Policy,
    Roster,
    Stage,
    best_width,
    in_order,
    share,
    takers,
    tick_seconds,
)

FLAT = Costs({"m": {1: 1.0, 2: 1.0, 4: 1.0}, "other": {1: 1.0, 2: 1.0, 4: 1.0}})  # a batch is free
STEEP = Costs({"m": {1: 1.0, 2: 2.0, 4: 4.0}})  # a batch gains nothing
BENT = Costs({"m": {1: 1.0, 4: 3.0}})


def kind(steps, costs=FLAT, rows=1, group="m", aside=0.0):
    """``aside`` seconds of each stage are a call that nobody shares."""
    alone = Meeting(f"{aside} s", 1, meets=None)
    costs = replace(costs, seconds={**costs.seconds, alone.name: {1: aside}})
    return Kind([Stage((Meeting(group, rows, computes=True), *[alone] * bool(aside)))] * steps, costs)


def jobs(*steps, **options):
    return [Job(number, kind(count, **options)) for number, count in enumerate(steps)]


def numbers(some):
    return [job.number for job in some]


def test_what_is_left_is_known_at_every_stage():
    one = kind(3, BENT, rows=2, aside=0.25)
    assert one.alone == (9.75, 6.5, 3.25, 0)
    assert one.shared[4] == (9, 6, 3, 0)
    assert Job(0, one, stage=2).seconds_left == 3.25
    assert kind(2, BENT).alone == (2, 1, 0)


def test_orders():
    three = [Job(0, kind(5), 9.0), Job(1, kind(2)), Job(2, kind(3), 4.0), Job(3, kind(1))]
    for order, wanted in {"fifo": [0, 1, 2, 3], "shortest": [3, 1, 2, 0], "deadline": [2, 0, 3, 1]}.items():
        assert numbers(in_order(Policy(order), three[1:], three[:1])) == wanted
    further = replace(three[0], stage=4)
    assert numbers(in_order(Policy("shortest"), three[1:3], [further])) == [0, 1, 2]


def test_who_waits_needs_a_free_lane():
    ordered = jobs(1, 2, 3, 4)
    for free, wanted in {0: [1, 3], 1: [0, 1, 3], 2: [0, 1, 2, 3]}.items():
        assert numbers(takers(ordered, {0, 2}, free)) == wanted


def test_a_tick_is_of_one_group_and_no_wider_than_asked():
    going = [*jobs(1, 1), Job(2, kind(1, group="other")), Job(3, kind(1, rows=2)), Job(4, kind(1))]
    assert numbers(share(going, 4)) == [0, 1, 3]
    assert numbers(share(going, 3)) == [0, 1, 4]
    assert numbers(share(going[2:], 4)) == [2]
    assert numbers(share(going[3:], 1)) == [3], "one goes on whatever the width"


def test_the_width_follows_what_a_batch_gains():
    assert best_width(jobs(4, 4, 4, 4)) == 4
    assert best_width(jobs(4, 4, 4, 4, costs=STEEP)) == 1
    assert best_width(jobs(*[4] * 3, costs=BENT)) == 1, "few: the first are done sooner one by one"
    assert best_width(jobs(*[4] * 40, costs=BENT)) == 4, "many: what counts is how many are done in the long run"
    assert best_width(jobs(1, 1, 1, 1, aside=3.0)) == 1, "a batch waits for what it cannot share"
    assert best_width(jobs(4, rows=2)) == 2


@pytest.mark.parametrize("order", ["fifo", "shortest", "deadline"])
def test_a_roster_ends_all_and_never_runs_more_than_its_lanes(order):
    roster = Roster(Policy(order), 2, jobs(3, 1, 2, 5))
    ends, left = [], roster.seconds_left
    while chosen := roster.pick():
        assert len(roster.running) <= 2
        assert tick_seconds(chosen) == 1
        ends += roster.advance(chosen)
        assert roster.seconds_left == left - len(chosen)
        left = roster.seconds_left
    assert sorted(ends) == [0, 1, 2, 3]
    assert ends == {"fifo": [1, 0, 2, 3]}.get(order, [1, 2, 0, 3])


def test_a_request_that_is_removed_is_no_longer_served():
    roster = Roster(Policy("fifo", 1), 1, jobs(2, 2, 2))
    chosen = roster.pick()
    roster.remove(0)
    roster.remove(1)
    assert roster.advance(chosen) == []
    assert numbers(roster.pick()) == [2]


def test_the_width_is_that_of_those_who_are_present():
    roster = Roster(Policy("fifo"), 8, jobs(*[4] * 40, costs=BENT))
    assert len(roster.pick()) == 4
    for number in range(2, 40):
        roster.remove(number)
    assert len(roster.pick()) == 1
    for job in jobs(*[4] * 40, costs=BENT)[2:]:
        roster.add(job)
    assert len(roster.pick()) == 4


def test_what_the_host_does_counts():
    one = kind(2, Costs({"m": {1: 1.0, 2: 1.5}}, tick=0.5, request=0.25, call=0.125), aside=0.25)
    assert one.alone == (4.5, 2.25, 0)
    assert tick_seconds([Job(0, one)]) == 2.25
    assert tick_seconds([Job(0, one), Job(1, one)]) == 1.5 + 0.5 + 2 * (0.25 + 0.25 + 2 * 0.125)


FORECAST, RUN = Meeting("f", 1, meets=3), Meeting("m", 1, computes=True)
CHEAP = {"f": {1: 0.25, 2: 0.25, 4: 1.5}, "m": {1: 1.0, 2: 1.5, 4: 2.0}}


def test_calls_are_shared_by_those_who_are_alike_where_that_is_quicker():
    two, asking = Stage((FORECAST, RUN)), Stage((replace(FORECAST, asks=True), RUN))
    other = Stage((RUN, replace(FORECAST, meets=4)))
    for stages, brings, seconds in (
        ((two, two), b"aa", 0.25 + 1.5),
        ((two, other), b"aa", 0.25 + 1.5 + 0.25),
        ((asking, asking), b"aa", 0.25 + 1.5),
        ((asking, asking), b"ab", 0.5 + 1.5),
        ((two, two, two), b"aaa", 0.75 + 2.0),
    ):
        jobs = [Job(place, Kind([one], Costs(CHEAP)), brings=brings[place : place + 1]) for place, one in enumerate(stages)]
        assert tick_seconds(jobs) == seconds


def test_the_model_waits_until_all_are_there():
    assert groups_of({5: (FORECAST, b""), 6: (RUN, b""), 7: (FORECAST, b"")}) == [[5, 7]]
    assert groups_of({5: (RUN, b""), 6: (RUN, b"")}) == [[5, 6]]
    alone = replace(RUN, meets=None)
    assert groups_of({5: (alone, b""), 6: (alone, b"")}) == [[5], [6]]


def test_policies_that_there_are_not():
    with pytest.raises(InputError, match="unknown policy 'fifi'. Did you mean 'fifo'"):
        Policy("fifi")
    with pytest.raises(InputError, match="width is 0"):
        Policy(width=0)
