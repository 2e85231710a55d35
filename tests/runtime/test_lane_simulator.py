"""Queues whose ends can be reckoned by hand, and what is said about them."""

from math import inf

import pytest

from cachec.runtime.errors import DeadlineError, InputError
from cachec.runtime.lane_costs import PACE_SHARE, Costs, Meeting, pace_after
from cachec.runtime.lane_policy import Job, Kind, Policy, Roster, Stage
from cachec.runtime.lane_simulator import Arrival, Desk, check_deadline, ends_of, poisson, simulate

COSTS = Costs({"m": {1: 1.0, 2: 1.5}})
LONG, SHORT = (Kind([Stage((Meeting("m", 1, computes=True),))] * steps, COSTS) for steps in (4, 1))
ONE_BY_ONE = Policy("fifo", 1)


def test_ends_are_those_of_a_queue_served_by_hand():
    arrivals = [Arrival(0, LONG), Arrival(0.5, SHORT), Arrival(2.5, SHORT)]
    assert simulate(arrivals, ONE_BY_ONE, lanes=3).ends == {0: 4, 1: 5, 2: 6}
    assert simulate(arrivals, Policy("shortest", 1), lanes=3).ends == {1: 2, 2: 4, 0: 6}
    assert simulate(arrivals, Policy("shortest", 1), lanes=1).ends == {0: 4, 1: 5, 2: 6}, "its lane is taken"
    assert simulate(arrivals, Policy("fifo", 2), lanes=3).ends == {1: 2.5, 2: 4, 0: 5}
    assert simulate(arrivals, ONE_BY_ONE, lanes=3, engines=2).ends == {0: 4, 1: 1.5, 2: 3.5}


def test_a_desk_does_one_thing_at_a_time_and_drags_on_the_lanes():
    arrivals = [Arrival(0, LONG), Arrival(0.5, SHORT)]
    assert simulate(arrivals, ONE_BY_ONE, lanes=3, desk=Desk(1, 0.5)).ends == {0: 5.5, 1: 6.5}
    assert simulate(arrivals, ONE_BY_ONE, lanes=3, desk=Desk(1, 0.5, drags=2)).ends == {0: 6, 1: 7.25}
    assert simulate(arrivals, ONE_BY_ONE, lanes=3, desk=Desk(1, 0.5, dragged=2)).ends == {0: 5.5 + 0.5, 1: 5 + 1 + 0.5}


def test_a_desk_that_takes_turns_with_the_lanes_goes_first():
    arrivals = [Arrival(0, LONG), Arrival(0.5, SHORT)]
    assert simulate(arrivals, ONE_BY_ONE, lanes=3, desk=Desk(1, 0.5, turns=True)).ends == {0: 1 + 1 + 4 + 0.5, 1: 6.5 + 1 + 0.5}


def test_who_cannot_be_in_time_is_not_taken():
    arrivals = [Arrival(0, LONG, 4.5), Arrival(0.5, LONG, 5), Arrival(0.6, SHORT, 5)]
    done = simulate(arrivals, Policy("deadline", 1), lanes=3, refuses=True)
    assert done.ends == {0: 4, 2: 5}
    assert done.latencies == [4, inf, 4.4]
    assert done.percentile(50) == 4.4
    assert simulate(arrivals, Policy("deadline", 1), lanes=3).ends == {0: 4, 1: 8, 2: 9}
    assert simulate(arrivals, Policy("deadline", 1), lanes=3, refuses=True, desk=Desk(0, 1)).ends == {1: 5.5}


@pytest.mark.parametrize(("within", "ends"), [(7.0, {0: 7, 1: 3}), (6.9, {0: 5})])
def test_who_is_decoded_holds_up_the_others_where_a_desk_takes_turns(within, ends):
    arrivals, desk = [Arrival(0, LONG, within), Arrival(0.5, SHORT, 6)], Desk(0, 1, turns=True)
    assert simulate(arrivals, Policy("deadline", 1), lanes=3, refuses=True, desk=desk).ends == ends


def test_deadlines_are_reckoned_at_the_pace_that_ticks_have():
    roster, short = Roster(ONE_BY_ONE, 2, [Job(0, LONG, after=0.5)]), Job(1, SHORT, 15.5)
    assert ends_of(roster, 10.0, 2.0) == {0: 18.5}
    check_deadline(roster, short, 10.0)
    with pytest.raises(DeadlineError, match=r"in 5.5 s, but the request would take 10.5 s"):
        check_deadline(roster, short, 10.0, 2.0)
    assert pace_after(1.0, 3.0, 1.0) == pytest.approx(1 + 2 * PACE_SHARE)
    assert (pace_after(1.0, 0.5, 1.0), pace_after(2.0, 1.0, 0.0)) == (1.0, 2.0)


def test_costs_may_be_scaled_to_what_was_seen():
    scaled = Costs({"m": {1: 1.0, 2: 1.5}}, tick=0.5, request=0.25, call=0.125).scaled(2)
    assert scaled == Costs({"m": {1: 2.0, 2: 3.0}}, tick=1, request=0.5, call=0.25)


def test_what_is_said_of_a_simulation():
    done = simulate([Arrival(1, LONG, 3), Arrival(1, SHORT), Arrival(11, SHORT)], ONE_BY_ONE, lanes=2)
    assert done.order == [0, 1, 2]
    assert done.latencies == [4, 5, 1]
    assert (done.span, done.busy) == (11, 6)
    assert done.utilisation == pytest.approx(6 / 11)
    assert [done.percentile(p) for p in (1, 50, 67, 100)] == [1, 4, 5, 5]
    assert done.goodput() == pytest.approx(2 / 11)
    assert done.goodput(4) == pytest.approx(1 / 11)


def test_poisson_arrivals_are_those_of_their_seed_and_rate():
    arrivals = poisson(4.0, 2000, [LONG, SHORT], 7, within=2)
    assert arrivals == poisson(4.0, 2000, [LONG, SHORT], 7, within=2) != poisson(4.0, 2000, [LONG, SHORT], 8, within=2)
    assert arrivals[-1].time == pytest.approx(500, rel=0.1)
    assert sum(one.kind is LONG for one in arrivals) == pytest.approx(1000, rel=0.1)


def test_more_engines_serve_more_and_shortest_first_waits_less():
    arrivals = poisson(0.5, 300, [LONG, SHORT], 1)

    def mean(policy, engines=1):
        done = simulate(arrivals, policy, lanes=8, engines=engines)
        return sum(done.latencies) / len(arrivals)

    assert mean(Policy("shortest")) < mean(Policy("fifo"))
    assert mean(ONE_BY_ONE, 3) < 0.5 * mean(ONE_BY_ONE)


def test_when_all_are_done_if_nobody_comes():
    roster = Roster(ONE_BY_ONE, 1, [Job(5, LONG), Job(6, SHORT)])
    assert ends_of(roster, 10.0) == {5: 14, 6: 15}
    assert len(roster.queued) == 2, "it was only asked"


def test_nothing_to_simulate_is_said():
    for arrivals, engines in (([], 1), ([Arrival(0, LONG)], 0)):
        with pytest.raises(InputError, match="there must be one of each"):
            simulate(arrivals, ONE_BY_ONE, lanes=1, engines=engines)
    with pytest.raises(InputError, match="rate is 0"):
        poisson(0, 1, [LONG], 1)
