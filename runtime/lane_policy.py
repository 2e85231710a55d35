"""Which requests share the next batch: pure functions over what waits, what runs, and what things cost.

A request is a row of *stages*. A stage is one run of the model and the cheap calls around it. A tick carries out one stage of
each of some requests whose stages are of one group: they share its run, and of the calls around it those that are alike.
All times are in seconds.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import inf
from operator import add

from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.lane_costs import Costs, Meeting, seconds_of


@dataclass(frozen=True)
class Stage:
    """One run of the model, and the cheap calls around it, in their order."""

    calls: tuple[Meeting, ...]

    @cached_property
    def run(self) -> Meeting:
        """That of the model. Those of one name can be one batch."""
        (run,) = (call for call in self.calls if call.computes)
        return run


class Kind:
    """All requests that play one program: their stages, and what is left of one from each stage on.

    ``alone[stage]``: seconds if nobody shares them; ``asides[stage]``: those of them that are not runs of the model, which are
    shared only with those who are at the same; ``shared[width][stage]``: of the runs of the model and the ticks around them, in
    batches of ``width`` rows.
    """

    def __init__(self, stages: Sequence[Stage], costs: Costs) -> None:
        self.stages, self.costs = tuple(stages), costs
        runs = [stage.run for stage in stages]
        widths = sorted({bucket for run in runs for bucket in costs.seconds[run.name]})
        self.shared = {
            width: _left([costs.of(run.name, max(width, run.rows)) + costs.tick for run in runs]) for width in widths
        }
        self.asides = _left([costs.aside(stage.calls) for stage in stages])
        own = _left([costs.of(run.name, run.rows) + costs.tick for run in runs])
        self.alone: tuple[float, ...] = tuple(map(add, own, self.asides))


def _left(seconds: Sequence[float]) -> tuple[float, ...]:
    """Sums from each place to the end; the last one is 0."""
    return (*reversed(tuple(accumulate(reversed(seconds)))), 0.0)


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """A request and how far it is: ``stage`` of its kind comes next. ``number``: in order of arrival; ``deadline``: when.

    ``brings``: stands for what it brings that all who share a call must have alike. ``after``: seconds until it is done when
    its stages are, in which nobody ticks.
    """

    number: int
    kind: Kind
    deadline: float = inf
    stage: int = 0
    brings: bytes = b""
    after: float = 0.0

    @property
    def group(self) -> str:
        return self.kind.stages[self.stage].run.name

    @property
    def rows(self) -> int:
        return self.kind.stages[self.stage].run.rows

    @property
    def seconds_left(self) -> float:
        """What is left of it, if nobody shares it."""
        return self.kind.alone[self.stage]


Order = Callable[[Job], tuple[float, ...]]  # the smaller, the sooner


def first_come(job: Job) -> tuple[float, ...]:
    """In order of arrival."""
    return (job.number,)


def shortest_first(job: Job) -> tuple[float, ...]:
    """Shortest remaining work first: the least mean time in the system where requests are served one by one (Schrage 1968)."""
    return (job.seconds_left, job.number)


def earliest_deadline(job: Job) -> tuple[float, ...]:
    """Requests without a deadline come last, the shortest first."""
    return (job.deadline, job.seconds_left, job.number)


ORDERS: Mapping[str, Order] = {"fifo": first_come, "shortest": shortest_first, "deadline": earliest_deadline}
LOOKS_AT = 64  # requests, when a width is chosen: what comes behind them changes little


@dataclass(frozen=True)
class Policy:
    """An order by name (``ORDERS``), and how many rows share a tick: ``None`` finds what serves those present soonest."""

    order: str = "shortest"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise unknown_name("policy", self.order, ORDERS)
        if self.width is not None and self.width < 1:
            raise InputError(f"width is {self.width}; a tick has at least one row")


def in_order(policy: Policy, queued: Iterable[Job], running: Iterable[Job]) -> list[Job]:
    """All requests, the most urgent one first."""
    return sorted((*running, *queued), key=ORDERS[policy.order])


def takers(ordered: Iterable[Job], waiting: Collection[int], free: int) -> list[Job]:
    """Who may go on: those with a lane, and of those ``waiting``, by number, the first ``free``."""
    going = list[Job]()
    for job in ordered:
        if job.number in waiting:
            if not free:
                continue
            free -= 1
        going.append(job)
    return going


def share(going: Sequence[Job], width: int) -> list[Job]:
    """Whose next stage is carried out now: the first of those who go on, and more of its group, up to ``width`` rows."""
    chosen, rows = [going[0]], going[0].rows
    for job in going[1:]:
        if job.group == chosen[0].group and rows + job.rows <= width:
            chosen.append(job)
            rows += job.rows
    return chosen


def best_width(jobs: Sequence[Job]) -> int:
    """Rows of a tick with which ``jobs`` of one group, served in this order, are done soonest in the mean. Of equals, the most.

    Each window of so many rows is reckoned to go on in step, and to make room for the next as it empties.
    """
    group, costs = jobs[0].group, jobs[0].kind.costs
    if len(jobs) == 1:
        return costs.bucket(group, jobs[0].rows)
    rows = [job.rows for job in jobs]
    asides = _sums([job.kind.asides[job.stage] for job in jobs])
    shared = {width: _sums([job.kind.shared[width][job.stage] for job in jobs]) for width in costs.seconds[group]}
    best, least = 0, inf
    for width in sorted(shared, reverse=True):
        clock, ends, first = 0.0, 0.0, 0
        while first < len(jobs):
            last, filled = first + 1, rows[first]
            while last < len(jobs) and filled + rows[last] <= width:
                filled += rows[last]
                last += 1
            batch, many = shared[costs.bucket(group, filled)], last - first
            took = batch[last] - batch[first] + many * (asides[last] - asides[first])
            ends += took + clock * many
            clock += took / many
            first = last
        if ends < least:
            best, least = width, ends
    return best


def _sums(values: Iterable[float]) -> list[float]:
    """Up to each place."""
    return list(accumulate(values, initial=0.0))


class Roster:
    """Who waits and who runs on one set of engines, by number; ``lanes`` can run at once. It knows no clock."""

    def __init__(self, policy: Policy, lanes: int, queued: Iterable[Job] = (), running: Iterable[Job] = ()) -> None:
        self.policy, self.lanes = policy, lanes
        self.queued = {job.number: job for job in queued}
        self.running = {job.number: job for job in running}
        self._widths = dict[str, int]()  # by group, for those who are present

    def copy(self, without: Collection[int] = ()) -> "Roster":
        queued, running = ([job for job in jobs.values() if job.number not in without] for jobs in (self.queued, self.running))
        return Roster(self.policy, self.lanes, queued, running)

    @property
    def jobs(self) -> list[Job]:
        return [*self.running.values(), *self.queued.values()]

    @property
    def seconds_left(self) -> float:
        """Of all requests, one after another."""
        return sum(job.seconds_left + job.after for job in self.jobs)

    def add(self, job: Job) -> None:
        self.queued[job.number] = job
        self._widths.clear()

    def remove(self, number: int) -> None:
        """Nothing is left of this request, wherever it was."""
        self.queued.pop(number, None)
        self.running.pop(number, None)
        self._widths.clear()

    def pick(self) -> list[Job]:
        """Whose stage comes next; those who waited run from now on."""
        ordered = in_order(self.policy, self.queued.values(), self.running.values())
        going = takers(ordered, self.queued.keys(), self.lanes - len(self.running))
        if not going:
            return []
        group = going[0].group
        if group not in self._widths:
            width = self.policy.width or best_width([job for job in ordered[:LOOKS_AT] if job.group == group] or going[:1])
            self._widths[group] = min(width, max(going[0].kind.costs.seconds[group]))
        chosen = share(going, self._widths[group])
        for job in chosen:
            if self.queued.pop(job.number, None) is not None:
                self.running[job.number] = job
        return chosen

    def advance(self, chosen: Sequence[Job]) -> list[int]:
        """These are a stage further. The numbers of those who are done, and gone."""
        done = []
        for job in chosen:
            if job.number not in self.running:
                continue
            if job.stage + 1 == len(job.kind.stages):
                self.remove(job.number)
                done.append(job.number)
            else:
                self.running[job.number] = replace(job, stage=job.stage + 1)
        return done


def tick_seconds(chosen: Sequence[Job]) -> float:
    """What the next stages of these take together, shared as lanes share them."""
    return seconds_of([(job.kind.stages[job.stage].calls, job.brings) for job in chosen], chosen[0].kind.costs)
