"""Requests that come, wait and are served, without engines: the policy of ``lanes`` on a clock that costs nothing.

It says when a request will be done, and plans for many GPUs: arrivals, percentiles, goodput. Times are in seconds.
"""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from cachec.runtime.errors import DeadlineError, InputError
from cachec.runtime.lane_policy import Job, Kind, Policy, Roster, tick_seconds


def ends_of(roster: Roster, now: float, pace: float = 1.0) -> dict[int, float]:
    """When each request is done if nobody comes any more, by number; ticks take ``pace`` times what they cost."""
    playing, ends = roster.copy(), dict[int, float]()
    while chosen := playing.pick():
        now += pace * tick_seconds(chosen)
        done = set(playing.advance(chosen))
        for job in chosen:
            if job.number in done:
                now += job.after
                ends[job.number] = now
    return ends


def check_deadline(roster: Roster, job: Job, now: float, pace: float = 1.0) -> None:
    """Raise ``DeadlineError`` unless a request can be done in time, and those with a deadline that were taken stay so.

    ``pace``: ticks take so many times what they cost.
    """
    trial = roster.copy()
    trial.add(job)
    dated = {one.number: one.deadline for one in trial.jobs if one.deadline < inf}
    if now + pace * trial.seconds_left <= min(dated.values()):
        return
    ends = ends_of(trial, now, pace)
    took, within, own = ends[job.number] - now, job.deadline - now, job.seconds_left + job.after
    if took > within:
        raise DeadlineError(
            f"the deadline is in {within:.3g} s, but the request would take {took:.3g} s, {own:.3g} s of them "
            "its own: give it more time, or take another level or fewer steps",
            took,
        )
    late = [number for number, when in dated.items() if ends[number] > when]
    before = ends_of(roster, now, pace) if late else {}
    if late := [number for number in late if before.get(number, inf) <= dated[number]]:
        raise DeadlineError(f"requests {late}, which were taken before, would miss their deadlines: give it more time", took)


@dataclass(frozen=True)
class Arrival:
    """A request of a kind at a time, to be done ``within`` so many seconds, the desk's included.

    ``brings`` as :class:`Job` has it.
    """

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
    """What became of arrivals, by their place: when each was done. ``busy``: seconds of all engines together.

    Those that ``refuses`` would not take are never done.
    """

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
        """Seconds from arrival to end, in order of arrival; infinite if a request was refused."""
        return [self.ends.get(place, inf) - arrival.time for place, arrival in enumerate(self.arrivals)]

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last end."""
        return max(self.ends.values(), default=self.arrivals[-1].time) - self.arrivals[0].time

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


@dataclass(frozen=True)
class Desk:
    """What a server does around lanes, a request at a time: seconds ``before`` it comes to them, and ``after`` it left them.

    Both share a machine: in ``turns``, where nobody ticks until the desk has done what there is to do; or a tick takes
    ``drags`` times as long while the desk works, and the desk ``dragged`` times as long while lanes tick.
    """

    before: float
    after: float
    drags: float = 1.0
    dragged: float = 1.0
    turns: bool = False


@dataclass(eq=False)
class _Machine:
    """One set of engines and the desk before it. ``tick`` and ``work``: what is being done, and the seconds that are left."""

    roster: Roster
    desk: Desk | None
    queue: deque[tuple[Job, bool]] = field(default_factory=deque)  # for the desk; is it done by the lanes?
    tick: tuple[list[Job], float] | None = None
    work: tuple[Job, bool, float] | None = None
    busy: float = 0.0

    @property
    def _drags(self) -> tuple[float, float]:
        both = self.desk is not None and self.tick is not None and self.work is not None
        return (self.desk.drags, self.desk.dragged) if self.desk is not None and both else (1.0, 1.0)

    def until(self) -> float:
        """Seconds until something is done."""
        tick, work = self._drags
        return min(inf if self.tick is None else self.tick[1] * tick, inf if self.work is None else self.work[2] * work)

    def move(self, seconds: float) -> tuple[list[Job], tuple[Job, bool] | None]:
        """Let so many pass, at most as ``until`` says: who ends a tick now, and what the desk has done."""
        tick, work = self._drags
        ended, done = list[Job](), None
        if self.tick is not None:
            chosen, left = self.tick
            self.busy += seconds
            self.tick = (chosen, left - seconds / tick) if left * tick > seconds else None
            ended = [] if self.tick else chosen
        if self.work is not None:
            job, after, left = self.work
            self.work = (job, after, left - seconds / work) if left * work > seconds else None
            done = None if self.work else (job, after)
        return ended, done

    def go_on(self) -> None:
        """Begin whatever can begin."""
        turns = self.desk is not None and self.desk.turns
        if self.work is None and self.queue and self.desk is not None and not (turns and self.tick):
            job, after = self.queue.popleft()
            self.work = job, after, self.desk.after if after else self.desk.before
        if self.tick is None and not (turns and self.work) and (chosen := self.roster.pick()):
            self.tick = chosen, tick_seconds(chosen)


def simulate(
    arrivals: Sequence[Arrival],
    policy: Policy,
    *,
    lanes: int,
    engines: int = 1,
    desk: Desk | None = None,
    refuses: bool = False,
) -> Simulation:
    """Serve ``arrivals``, in order of time, on so many sets of engines. Each goes where the least work is left.

    ``desk``: of the server before each set. ``refuses``: those who cannot be in time are not taken, as lanes do.

    Raises:
        InputError: there are none, or no engines.
    """
    if not arrivals or engines < 1 or lanes < 1:
        raise InputError(f"{len(arrivals)} arrivals, {engines} engines, {lanes} lanes: there must be one of each")
    machines = [_Machine(Roster(policy, lanes), desk) for _ in range(engines)]
    now, ends, place = 0.0, dict[int, float](), 0

    def take(machine: _Machine, job: Job) -> None:
        try:
            if refuses and job.deadline < inf:
                check_deadline(machine.roster, job, now)
        except DeadlineError:
            return
        machine.roster.add(job)

    while True:
        left = min(machine.until() for machine in machines)
        coming = arrivals[place].time - now if place < len(arrivals) else inf
        if (passed := max(0.0, min(left, coming))) == inf:
            break
        now = arrivals[place].time if coming <= left else now + passed
        for machine in machines:
            ended, done = machine.move(passed)
            gone = {job.number: job for job in ended}
            for number in machine.roster.advance(ended):
                if machine.desk is None:
                    ends[number] = now
                else:
                    machine.queue.append((gone[number], True))
            if done is not None and done[1]:
                ends[done[0].number] = now
            elif done is not None:
                take(machine, done[0])
        while place < len(arrivals) and arrivals[place].time <= now:
            one = arrivals[place]
            machine = min(machines, key=lambda each: each.roster.seconds_left)
            after = 0.0 if machine.desk is None else machine.desk.after
            turns = machine.desk is not None and machine.desk.turns
            until = one.time + one.within - (0.0 if turns else after)
            job = Job(place, one.kind, until, brings=one.brings, after=after if turns else 0.0)
            if machine.desk is None:
                take(machine, job)
            else:
                machine.queue.append((job, False))
            place += 1
        for machine in machines:
            machine.go_on()
    return Simulation(arrivals, ends, sum(machine.busy for machine in machines), engines)
