"""Lanes: many requests on one set of engines, a step of many of them at a time.

Requests of any level, number of steps, seed and guidance scale share the runs of the model, and come and go at any tick. What
one of them gets does not depend on its neighbours: rows of a batch know nothing of each other (engines whose ``rows_are_exact``
is false may round otherwise in batches of another size). All memory is taken, all calls are bound and timed when the lanes are
made; a tick only copies rows and makes calls.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from statistics import median

import numpy as np

from cachec.runtime.abi import BATCH, MAX_BATCH
from cachec.runtime.errors import EngineError, InputError, cannot_be_pickled
from cachec.runtime.lane_costs import Costs, groups_of, pace_after
from cachec.runtime.lane_memory import LaneMemory, View
from cachec.runtime.lane_plan import LanePlan, Port, variants_of
from cachec.runtime.lane_policy import Job, Kind, Policy, Roster, tick_seconds
from cachec.runtime.lane_ports import Ends, Ports
from cachec.runtime.lane_request import Key, Request, Tick, Ticket
from cachec.runtime.lane_simulator import check_deadline, ends_of
from cachec.runtime.session import LoadedBundle
from cachec.runtime.specs import Array
from cachec.runtime.texts import fit_texts
from cachec.runtime.variants import find_variant, label_of_shapes

log = logging.getLogger(__name__)
BUCKETS = (1, 2, 4, 8)
REHEARSALS = 5  # of which the median counts


class Lanes:
    """``lanes`` requests at once, ``submit`` for more to wait; ``tick`` carries out one step of some, by ``policy``.

    ``submit`` and ``Ticket.cancel`` may be called from any thread, ``tick`` from one at a time. ``buckets``: the batches that
    engines are bound to, in rows (a guided request has two), 1, 2, 4 and 8 of them that the engines take if nothing is said; a
    batch is filled up to the smallest that fits. ``policy``: how requests are ordered and how many share a tick, or the name of
    an order. ``costs``: seconds of every call, as the ``costs``
    of other lanes on such a machine; without, they are measured. ``sizes``: of the bundle, which requests may ask for; the one
    it was loaded for without. ``texts``: lengths, of which a request has the shortest that holds its own text, and shares calls
    with others of it; all that the bundle has without. ``starts``: steps, beside the first, that requests may begin at.
    ``clock``: seconds, as ``time.monotonic``.

    Raises:
        InputError: no request fits in the buckets, the engines take no such batches, or there is no memory.
    """

    def __init__(
        self,
        bundle: LoadedBundle,
        *,
        lanes: int = 8,
        buckets: Sequence[int] | None = None,
        policy: Policy | str = "shortest",
        costs: Costs | None = None,
        sizes: Sequence[str] | None = None,
        texts: Sequence[int] | None = None,
        starts: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        most = bundle.target.sizes.get(BATCH, (MAX_BATCH,))[-1]
        if buckets is None:
            buckets = [bucket for bucket in BUCKETS if bucket <= most]
        if lanes < 1 or not buckets or min(buckets) < 1:
            raise InputError(f"there are {lanes} lanes and buckets {list(buckets)}; there must be one of each, of 1 or more")
        if max(buckets) > most:
            raise InputError(
                f"buckets are {list(buckets)}; the engines of {bundle.target} take up to {most} rows: name smaller ones, or "
                "build the engines with a larger --max-batch"
            )
        self._clock, self._variants = clock, variants_of(bundle, sizes, texts)
        self._lengths = dict.fromkeys(one.manifest.settings.get("text_tokens", 0) for one in self._variants)
        self._plans, self._cannot = _plans(self._variants, starts)
        self._device = next(iter(bundle.engines.values())).device.for_session()
        self._ports = Ports((call for plan in self._plans.values() for call in plan.calls), buckets, self._device)
        self._memory, self._free = LaneMemory(self._plans, lanes, self._device), list(range(lanes))
        self._policy, self._num_lanes = Policy(policy) if isinstance(policy, str) else policy, lanes
        self._run = self._ports.run
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._prepare(costs)

    def __reduce__(self) -> str:
        raise cannot_be_pickled("lanes", "load the bundle in the other process, and make some there")

    @property
    def num_queued(self) -> int:
        """Requests that wait for a lane."""
        return len(self._roster.queued)

    @property
    def num_running(self) -> int:
        """Requests in lanes."""
        return len(self._roster.running)

    def kind(self, level: str | None = None, *, steps: int | None = None, size: str | None = None, start: int = 0) -> Kind:
        """What a request is to the policy and to the simulator: its stages, with the costs that were measured here."""
        return self._kinds[self._key(level, steps, size, start)]

    def submit(
        self,
        conditions: Mapping[str, Array],
        *,
        noise: Array | None = None,
        seed: int | None = None,
        level: str | None = None,
        steps: int | None = None,
        size: str | None = None,
        start: int = 0,
        deadline: float | None = None,
        after: float = 0.0,
    ) -> Ticket:
        """Take a request of one sample: conditions [1, …], and noise [1, …] or a ``seed``; numpy arrays, which are copied.

        Texts may have any length, where the bundle has several.

        ``start``: the step it begins at, one of the ``starts``, with latents of its noise level in the place of noise.
        ``deadline``: seconds from now within which it is to be done. ``after``: those of them that go by when its steps are
        done, in which nobody ticks: what a caller does with its latents on the same cores.

        Raises:
            InputError: it does not fit, or there is no such level, size or number of steps.
            DeadlineError: it cannot be done in time, or only if others that were taken are late.
        """
        key, conditions = self._fitted(self._key(level, steps, size, start), conditions)
        plan = self._plans[key]
        if deadline is not None and not deadline > 0:
            raise InputError(f"the deadline is in {deadline} s; it must be later than now")
        if start and seed is not None:
            raise InputError(f"start is {start}, and no seed stands for latents of that noise level: give them as noise")
        latents = plan.noise(noise, seed)
        plan.check(conditions)
        return self._take(key, {name: value.copy() for name, value in conditions.items()}, latents, deadline, after)

    def _take(
        self, key: Key, conditions: Mapping[str, Array], noise: Array, deadline: float | None = None, after: float = 0.0
    ) -> Ticket:
        plan = self._plans[key]
        digest = plan.shared_digest(conditions)
        with self._changed:
            now, number = self._clock(), next(self._numbers)
            until = inf if deadline is None else now + deadline
            job = Job(number, self._kinds[key], until, brings=digest, after=after)
            if job.deadline < inf:
                check_deadline(self._present(), job, now, self._pace)
            ticket = Ticket(number, plan.level, plan.num_steps)
            self._requests[number] = Request(ticket, key, plan, conditions, noise, digest)
            self._roster.add(job)
            self._changed.notify_all()
        return ticket

    def _key(self, level: str | None, steps: int | None, size: str | None, start: int) -> Key:
        place = 0
        if (size, steps) != (None, None):
            place = find_variant([one.manifest.variants[0] for one in self._variants], size, steps)
        key = place, self._variants[place].check_level(level), start
        if key in self._cannot:
            raise InputError(str(self._cannot[key]))
        if key not in self._plans:
            raise InputError(f"start is {start}, which these lanes were not made for: name it in Lanes(…, starts=[…])")
        return key

    def _fitted(self, key: Key, conditions: Mapping[str, Array]) -> tuple[Key, Mapping[str, Array]]:
        """The same at the shortest text that holds these, and them at its length; where there is a choice."""
        alike = {length: key[0] + place for place, length in enumerate(self._lengths)}  # as variants_of has them
        length, fitted = fit_texts(self._variants[key[0]].io, conditions, alike)
        return (key if length is None else (alike[length], *key[1:])), fitted

    def _prepare(self, costs: Costs | None) -> None:
        """Make every call once on empty lanes, so that nothing is left that happens only the first time; measure."""
        known = None if costs is None else self._ports.of_these(costs)
        host = (0.0, 0.0, 0.0) if known is not None else self._rehearse()
        examples = dict[str, Ends]()
        for key, plan in self._plans.items():
            for call, ends in zip(plan.calls, self._memory.views[0, key].ends, strict=True):
                if call.port.name not in examples or ends.rows < examples[call.port.name].rows:
                    examples[call.port.name] = ends
        clear = self._memory.clear_first
        self._ports.warm_up(examples, clear)
        self._reckon(known or Costs(self._ports.measure(examples, clear, self._clock).seconds, *host), self._policy)

    def _reckon(self, costs: Costs, policy: Policy) -> None:
        """Serve by these from now on; nobody is here yet."""
        self.costs, self._kinds = costs, {key: plan.kind(costs) for key, plan in self._plans.items()}
        self._roster, self._numbers, self._pace = Roster(policy, self._num_lanes), itertools.count(), 1.0

    def _rehearse(self) -> tuple[float, ...]:
        """What the host does: seconds of a tick, for each request in it, and for each call of each. No calls are made."""
        self._reckon(self._ports.flat(0.0), Policy("fifo", self._num_lanes))
        self._run = _no_call
        by_stages = sorted(self._plans.items(), key=lambda item: len(item[1].stages))
        counts, seconds = list[tuple[float, ...]](), list[float]()
        for (key, plan), many in itertools.product((by_stages[0], by_stages[-1]), (1, self._num_lanes)):
            took = list[float]()
            for _ in range(REHEARSALS):
                for _ in range(many):
                    self._take(key, plan.zeros(), plan.noise(None, 0))
                ticks = list(iter(self.tick, None))
                took.append(sum(tick.seconds for tick in ticks) / len(ticks))
            counts.append((1.0, sum(len(tick.tickets) for tick in ticks) / len(ticks), many * len(plan.calls) / len(ticks)))
            seconds.append(median(took))
        self._run = self._ports.run
        return tuple(max(0.0, float(one)) for one in np.linalg.lstsq(np.array(counts), np.array(seconds), rcond=None)[0])

    def expected_ends(self) -> dict[int, float]:
        """Seconds until each request that is here is done, by its number, if nobody comes after them."""
        with self._changed:
            roster, pace = self._present(), self._pace
        return ends_of(roster, 0.0, pace)

    def _present(self) -> Roster:
        """A copy of who waits and who runs, without those that are done or cancelled."""
        return self._roster.copy(without={number for number, one in self._requests.items() if one.ticket.done})

    def latents(self, ticket: Ticket) -> Array | None:
        """Those of a request on its way [1, …], as they are between two ticks; ``None``: it is in no lane.

        For the thread that ticks.
        """
        request = self._requests.get(ticket.number)
        return None if request is None or not request.made else self._fetch(request)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to do, at most ``timeout`` seconds; is there?"""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._requests), timeout)

    def run_until_idle(self) -> None:
        """Tick until every request is done."""
        while self.tick() is not None:
            pass

    def tick(self) -> Tick | None:
        """One step of the requests that the policy chooses; ``None``: there are none.

        A request that fails, or was cancelled, leaves the others alone.
        """
        start = self._clock()
        with self._changed:
            cancelled = [one for one in self._requests.values() if one.ticket.done]
            for request in cancelled:
                self._leave(request)
            chosen = self._roster.pick()
            requests = [self._requests[job.number] for job in chosen]
            for request in requests:
                if request.lane is None:
                    request.lane = self._free.pop()
        for request in cancelled:
            request.deliver(None)
        if not requests:
            return None
        for request in requests:
            if not request.has_begun:
                self._begin(request)
        self._play(requests, [one.plan.stages[job.stage].stop for one, job in zip(requests, chosen, strict=True)])
        ended = [one for one in requests if one.error is not None or one.made == len(one.plan.calls)]
        latents = [None if one.error is not None else self._fetch(one) for one in ended]
        with self._changed:
            self._roster.advance(chosen)
            for request in ended:
                self._leave(request)
        for request, result in zip(ended, latents, strict=True):
            request.deliver(result)
        tickets, rows = tuple(one.ticket for one in requests), sum(job.rows for job in chosen)
        seconds, reckoned = self._clock() - start, tick_seconds(chosen)
        self._pace = pace_after(self._pace, seconds, reckoned)
        return Tick(tickets, rows, tuple(one.ticket for one in ended), seconds, reckoned)

    def _view(self, request: Request) -> View:
        assert request.lane is not None  # as the tick has given it one
        return self._memory.views[request.lane, request.key]

    def _leave(self, request: Request) -> None:
        """Nothing is left of it here."""
        del self._requests[request.ticket.number]
        self._roster.remove(request.ticket.number)
        if request.lane is not None:
            self._free.append(request.lane)

    def _play(self, requests: Sequence[Request], stops: Sequence[int]) -> None:
        """Make each request's calls up to its stop."""
        while active := [one for one, stop in zip(requests, stops, strict=True) if one.error is None and one.made < stop]:
            for group in groups_of({place: (one.next_call.meeting, one.digest) for place, one in enumerate(active)}):
                self._call([active[place] for place in group])
        if self._device.beside_host:  # whose NaN is seen when a request ends, not to fetch latents in every step
            try:
                self._device.synchronize()  # the next choice is made when this one has been carried out, as it is reckoned
            except EngineError as error:  # of work that was only queued: nobody knows whose
                for request in requests:
                    request.fail(error)
            return
        for request in requests:
            if request.error is None:
                self._fetch(request)

    def _call(self, group: Sequence[Request]) -> None:
        """Make the next call of requests that meet there: in one batch unless alone is quicker."""
        port, calls = group[0].next_call.port, [one.next_call.meeting for one in group]
        if len(group) > 1 and not self.costs.share(calls):
            for request in group:
                self._call([request])
            return
        ends = [self._view(one).ends[one.made] for one in group]
        try:
            self._run(port, self.costs.bucket(port.name, sum(one.rows for one in calls)), ends)
        except EngineError as error:
            self._apart(group, error)
            return
        for request in group:
            request.ticket.step = max((request.ticket.step, *(step + 1 for step in request.next_call.planned.steps)))
            request.made += 1

    def _apart(self, group: Sequence[Request], error: EngineError) -> None:
        """A call failed: one request may be why, and the others are to go on."""
        if len(group) == 1:
            group[0].fail(error)
            return
        log.warning("a batch of %d requests failed, which are tried one by one: %s", len(group), error)
        for request in group:
            self._call([request])

    def _begin(self, request: Request) -> None:
        try:
            self._view(request).take(request.conditions, request.noise)
        except EngineError as error:
            request.fail(error)
        request.has_begun = True

    def _fetch(self, request: Request) -> Array | None:
        """Its latents, if they can be had and are numbers; if not, it knows why."""
        try:
            latents = self._view(request).latents(request.made)
        except EngineError as error:
            request.fail(error)
            return None
        request.check_latents(latents)
        return latents


def _no_call(port: Port, bucket: int, ends: Sequence[Ends]) -> None:
    """In the place of ``Ports.run``."""


def _plans(variants: Sequence[LoadedBundle], starts: Sequence[int]) -> tuple[dict[Key, LanePlan], dict[Key, InputError]]:
    """The plan of every level of each from each start, or why it cannot begin there; calls of one size meet at one port."""
    ports: dict[str, Port] = {}
    plans, cannot = dict[Key, LanePlan](), dict[Key, InputError]()
    several = len({one.target.shape_bucket for one in variants}) > 1
    for place, one in enumerate(variants):
        apart = f"{label_of_shapes(one.target.shape_bucket)}/" if several else ""
        for level, start in itertools.product(one.programs, dict.fromkeys((0, *starts))):
            try:
                plans[place, level, start] = LanePlan.of(one, level, start, apart, ports)
            except InputError as error:
                if not start:
                    raise
                cannot[place, level, start] = error  # for those who ask for it
    return plans, cannot
