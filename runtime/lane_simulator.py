"""Requests that come, wait and are served, without engines: the policy of ``lanes`` on a clock that costs nothing.

It says when a request will be done, and plans for many GPUs: arrivals, percentiles, goodput. Times are in seconds.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf

from cachec.runtime.errors import InputError
from cachec.runtime.lane_policy import Job, Kind, Policy, Roster, tick_seconds


def ends_of(roster: Roster, now: float) -> dict[int, float]:
    """When each request is done if nobody comes any more, by number."""
    playing, ends = roster.copy(), dict[int, float]()
    while chosen := playing.pick():
        now += tick_seconds(chosen)
        ends |= dict.fromkeys(playing.advance(chosen), now)
    return ends


@dataclass(frozen=True)
class Arrival:
    """A request of a kind at a time, to be done ``within`` so many seconds; ``brings`` as :class:`Job` has it."""

    time: float
    kind: Kind
    within: float = inf
    brings: bytes = b""


def poisson(rate: float, count: int, kinds: Sequence[Kind], seed: int, *, within: float = inf) -> list[Arrival]:
    """``count`` arrivals, ``rate`` a second in the mean, each of one of ``kinds`` with equal chances."""
    if not rate > 0:
        raise InputError(f"rate is {rate}; it must be above 0 requests a second")
    draw, time, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        time += draw.expovariate(rate)
        arrivals.append(Arrival(time, draw.choice(kinds), within))
    return arrivals


@dataclass(frozen=True)
class Simulation:
    """What became of arrivals, by their place: when each was done. ``busy``: seconds of all engines together."""

    arrivals: Sequence[Arrival]
    ends: Mapping[int, float]
    busy: float
    engines: int

    @property
    def order(self) -> list[int]:
        """The arrivals by their ends; those that ended in one tick by their place."""
        return sorted(self.ends, key=lambda place: (self.ends[place], place))

    @property
    def latencies(self) -> list[float]:
        """Seconds from arrival to end, in order of arrival."""
        return [self.ends[place] - arrival.time for place, arrival in enumerate(self.arrivals)]

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last end."""
        return max(self.ends.values()) - self.arrivals[0].time

    @property
    def utilisation(self) -> float:
        """Which share of that time an engine worked."""
        return self.busy / (self.span * self.engines)

    def percentile(self, percent: float) -> float:
        """The latency that so many of a hundred requests do not exceed."""
        ordered = sorted(self.latencies)
        return ordered[max(0, ceil(percent / 100 * len(ordered)) - 1)]

    def goodput(self, limit: float = inf) -> float:
        """Requests a second that were done within ``limit`` seconds, and within their own."""
        good = sum(
            latency <= min(limit, arrival.within) for latency, arrival in zip(self.latencies, self.arrivals, strict=True)
        )
        return good / self.span


def simulate(arrivals: Sequence[Arrival], policy: Policy, *, lanes: int, engines: int = 1) -> Simulation:
    """Serve ``arrivals``, in order of time, on so many sets of engines. Each goes where the least work is left.

    Raises:
        InputError: there are none, or no engines.
    """
    if not arrivals or engines < 1 or lanes < 1:
        raise InputError(f"{len(arrivals)} arrivals, {engines} engines, {lanes} lanes: there must be one of each")
    rosters = [Roster(policy, lanes) for _ in range(engines)]
    chosen: dict[int, list[Job]] = {}  # the tick that an engine is in
    ticks: list[tuple[float, int]] = []  # their ends
    ends, busy, place = dict[int, float](), 0.0, 0
    while place < len(arrivals) or ticks:
        now = min([*(tick[0] for tick in ticks[:1]), *(arrival.time for arrival in arrivals[place : place + 1])])
        while ticks and ticks[0][0] <= now:
            _, engine = heappop(ticks)
            ends |= dict.fromkeys(rosters[engine].advance(chosen.pop(engine)), now)
        while place < len(arrivals) and arrivals[place].time <= now:
            engine = min(range(engines), key=lambda one: rosters[one].seconds_left)
            rosters[engine].add(Job(place, arrivals[place].kind, now + arrivals[place].within, brings=arrivals[place].brings))
            place += 1
        for engine in set(range(engines)) - set(chosen):
            if next_ones := rosters[engine].pick():
                took = tick_seconds(next_ones)
                chosen[engine], busy = next_ones, busy + took
                heappush(ticks, (now + took, engine))
    return Simulation(arrivals, ends, busy, engines)
