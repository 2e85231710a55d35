"""Where requests come in and results go out: admission, encoding, lanes, decoding, in the order that a request goes through.

Handlers run in the event loop and only wait. Text encoders and decoders run in a few threads, lanes in one of their own; where
they want the same cores, they take turns.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from cachec.pictures.beginning import Beginning
from cachec.runtime.errors import DeadlineError, unknown_name
from cachec.runtime.lane_request import Tick, Ticket
from cachec.runtime.noise import NUM_SEEDS
from cachec.runtime.specs import Array
from cachec.serving.health import Health
from cachec.serving.limits import Limits
from cachec.serving.metrics import Metrics
from cachec.serving.refusals import STOPPED, Refused, refused_for
from cachec.serving.served import Choice, Served
from cachec.serving.ticker import Seen, Ticker
from cachec.serving.turns import Held, Turns
from cachec.serving.wishes import Common

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
Watcher = Callable[[int, Seen], None]  # which sample of the request, and how far it is; called in the event loop


@dataclass(frozen=True)
class Made:
    """What a request gets: files, in order of their ``seeds``. ``seconds`` are of all of it, waiting included."""

    files: tuple[bytes, ...]
    seeds: tuple[int, ...]
    level: str
    size: str
    steps: int
    seconds: float
    denoise_seconds: float
    peak_memory_mb: float | None

    @property
    def measured(self) -> dict[str, float]:
        """What replies say of it, with sglang's names where it has some."""
        found = {
            "inference_time_s": self.seconds,
            "denoise_time_s": self.denoise_seconds,
            "peak_memory_mb": self.peak_memory_mb,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(eq=False)
class Job:
    """A request that was taken. ``number`` is its id, all that is logged of it."""

    number: str
    served: Served
    choice: Choice
    begun: float = field(default_factory=time.monotonic)


async def in_own_thread(work: Callable[[], None]) -> None:
    """Carry out what ends something: those threads that the loop has may have ended before it."""
    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, work)


class Desk:
    """One server's requests. ``threads``: how many encode and decode at once. ``log_requests``: what they ask for, too."""

    def __init__(self, served: Sequence[Served], limits: Limits, *, threads: int = 1, log_requests: bool = False) -> None:
        self.served = {one.name: one for one in served}
        self.limits, self.metrics = limits, Metrics()
        self._health = {name: Health(name) for name in self.served}
        self._turns = Turns(on=any(one.in_turns for one in served))
        self.ticker = Ticker([one.lanes for one in served], self._note, self._turns)
        self._threads = ThreadPoolExecutor(threads, "cachec-pictures")
        self._logs = log_requests
        self._names = [one.name for one in served]
        self._present = dict.fromkeys(self.served, 0)  # samples, from taken to made
        self._jobs = set[asyncio.Task[Made]]()
        self._begun = dict[Ticket, float]()  # of tickets without a step yet
        self._estimates = dict.fromkeys(self.served, (0.0, 1.0))  # until when one holds, and what it is
        self.draining = self._stopped = False
        for one in served:
            self.metrics.watch(one.name, lambda one=one: one.lanes.num_queued, lambda one=one: one.lanes.num_running)  # type: ignore[misc]

    @property
    def failure(self) -> Exception | None:
        """Why nothing is made: a tick failed as none should, or a bundle's engines fail request after request."""
        return self.ticker.failure or next((one.failure for one in self._health.values() if one.failure is not None), None)

    @property
    def num_present(self) -> int:
        """Samples of all requests that were taken and are not done."""
        return sum(self._present.values())

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Desk"]:
        """Work from here on; at the end nothing is left that runs."""
        try:
            for one in self.served.values():
                await self.apart(one.warm_up)
            self.ticker.start()
            yield self
        finally:
            self.draining = True
            await self._let_go()
            await in_own_thread(self.ticker.stop)
            await in_own_thread(partial(self._threads.shutdown, cancel_futures=True))

    async def drain(self) -> None:
        """Take no more requests; those that are here get ``limits.grace`` seconds, and are then handed back."""
        self.draining = True
        end = time.monotonic() + self.limits.grace
        while self._jobs and time.monotonic() < end:
            await asyncio.wait(set(self._jobs), timeout=end - time.monotonic())
        await self._let_go()

    async def _let_go(self) -> None:
        self._stopped = True
        for task in self._jobs:
            task.cancel()
        if self._jobs:
            await asyncio.wait(set(self._jobs))

    def find(self, model: str | None) -> Served:
        """The bundle of this name, or the first.

        Raises:
            Refused: there is none.
        """
        if model is None:
            return self.served[self._names[0]]
        if model not in self.served:
            raise Refused(404, str(unknown_name("model", model, self.served)), code="model_not_found", param="model")
        return self.served[model]

    def admit(self, wish: Common, number: str, *, video: bool = False, picture: Array | None = None) -> Job:
        """Take a request, with the ``picture`` that it brings, or say at once why not.

        Raises:
            Refused: it does not fit the bundle or a limit; there are too many; or the server stops.
        """
        try:
            served = self.find(wish.model)
            served.check_kind(video=video)
            choice = served.choose(wish, self.limits, lambda: secrets.randbelow(NUM_SEEDS), picture)
            self._check_room(served, len(choice.seeds))
        except Refused as refused:
            self.metrics.refused.labels(refused.code).inc()
            raise
        if self._logs:
            log.info("request %s: %s of %s", number, choice, served.name)
        return Job(number, served, choice)

    def _check_room(self, served: Served, count: int) -> None:
        if self.draining:
            raise Refused(503, STOPPED, code="stopping", retry_after=5)
        if self.ticker.failure is not None:
            raise Refused(503, "the engines failed, and nothing is made any more: start the server again", code="broken")
        most = self.limits.queue + served.num_lanes
        if self._present[served.name] + count > most:
            wait = self._seconds_until_room(served)
            raise Refused(429, f"{self._present[served.name]} samples are being made or wait, and there is room for {most}: "
                          f"try again in {wait:.1f} s", code="queue_full", retry_after=wait)  # fmt: skip

    def _seconds_until_room(self, served: Served) -> float:
        """Until the next of the requests that are here is done, by what their steps cost. Reckoned once a second at most."""
        now, (until, seconds) = time.monotonic(), self._estimates[served.name]
        if now >= until:
            seconds = min(served.lanes.expected_ends().values(), default=1.0)
            self._estimates[served.name] = now + 1.0, seconds
        return seconds

    def start(self, job: Job, watcher: Watcher | None = None, *, latents: bool = False) -> "asyncio.Task[Made]":
        """Begin to make what was admitted. Cancel the task to let go of it."""
        task = asyncio.get_running_loop().create_task(self._run(job, watcher, latents), name=job.number)
        self._present[job.served.name] += len(job.choice.seeds)
        self._jobs.add(task)
        task.add_done_callback(lambda task: self._gone(job, task))
        return task

    def _gone(self, job: Job, task: "asyncio.Task[Made]") -> None:
        self._jobs.discard(task)
        self._present[job.served.name] -= len(job.choice.seeds)
        labels, seconds = (job.served.name, job.choice.level), time.monotonic() - job.begun
        error = None if task.cancelled() else task.exception()
        outcome = "cancelled" if task.cancelled() else "made" if error is None else _outcome(error)
        self.metrics.requests.labels(*labels, outcome).inc()
        late = job.choice.deadline is not None and seconds > job.choice.deadline
        if outcome == "deadline" or (outcome == "made" and late):
            self.metrics.misses.labels(*labels).inc()
        if outcome == "made":
            self.metrics.request_seconds.labels(*labels).observe(seconds)
        log.info("request %s: %s in %.3f s", job.number, outcome, seconds)

    async def _run(self, job: Job, watcher: Watcher | None, latents: bool) -> Made:
        served, choice, held = job.served, job.choice, self._turns.hold()
        try:
            async with asyncio.timeout(self.limits.seconds):
                begun = time.perf_counter()
                given = await self.apart(served.conditions, choice)
                begin = Beginning() if choice.picture is None else await self.apart(served.begin, choice)
                encoded = time.perf_counter()
                self.metrics.encode_seconds.labels(served.name).observe(encoded - begun)
                made = await self._denoise(job, given, begin, watcher, latents, held)
                denoised = time.perf_counter()
                files = tuple([await self.apart(served.finish, choice, one) for one in made])
                self.metrics.decode_seconds.labels(served.name).observe(time.perf_counter() - denoised)
        except asyncio.CancelledError as error:
            if self._stopped:
                raise Refused(503, STOPPED, code="stopping", retry_after=5) from error
            raise
        except Exception as error:
            self._health[served.name].note(error)
            refused = refused_for(error)
            if refused.code == "internal_error":
                log.exception("request %s failed", job.number)
            raise refused from error
        finally:
            held.let_go()
        self._health[served.name].note(None)
        seconds = time.monotonic() - job.begun
        peak = served.peak_memory_mb
        return Made(files, choice.seeds, choice.level, choice.size, choice.steps, seconds, denoised - encoded, peak)

    async def _denoise(
        self,
        job: Job,
        given: dict[str, Array],
        begin: Beginning,
        watcher: Watcher | None,
        latents: bool,
        held: Held,
    ) -> list[Array]:
        """Latents [1, …] of every seed; what comes then is ``held`` to be next. Whatever happens, no ticket stays behind."""
        loop, tickets = asyncio.get_running_loop(), list[Ticket]()
        last, told = job.served.program(job.choice).num_steps, [asyncio.Event() for _ in job.choice.seeds]

        going = list(job.choice.seeds)

        def ended(_: object) -> None:
            going.pop()
            if not going:
                held.take()

        def hear(place: int, seen: Seen) -> None:
            if watcher is not None:
                watcher(place, seen)
            if seen.step == last:
                told[place].set()

        try:
            for place, seed in enumerate(job.choice.seeds):
                seen = None if watcher is None else _from_thread(loop, hear, place)
                first = {"seed": seed} if begin.latents is None else {"noise": job.served.mixed(job.choice, begin, seed)}
                ticket = self._submit(job, {"conditions": given, "start": begin.start, **first}, seen, latents)
                tickets.append(ticket)
                ticket.future.add_done_callback(ended)
            made = await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
            if watcher is not None:  # of its last step a tick tells after it has given the result
                await asyncio.gather(*(one.wait() for one in told))
            return list(made)
        finally:
            for ticket in tickets:
                ticket.cancel()
                self._begun.pop(ticket, None)
            self.ticker.wake()

    def _submit(self, job: Job, given: dict[str, Any], seen: Callable[[Seen], None] | None, latents: bool) -> Ticket:
        choice, lanes = job.choice, job.served.lanes
        left, after = None, job.served.seconds_after(choice)
        if choice.deadline is not None:
            left = choice.deadline - (time.monotonic() - job.begun)
            if left <= after:
                words = f"of the deadline of {choice.deadline:g} s nothing is left for steps, and decoding takes {after:.3g} s"
                raise DeadlineError(f"{words}: give it more time", after)
        given |= {"level": choice.level, "steps": choice.steps, "size": choice.size, "deadline": left}
        if job.served.in_turns:  # whoever is decoded holds up those who are not
            given["after"] = self.ticker.seconds_between or after / len(choice.seeds)
        elif left is not None:
            given["deadline"] = left - after
        ticket = self.ticker.submit(lambda: lanes.submit(**given), seen, latents=latents)
        self._begun[ticket] = time.monotonic()
        return ticket

    def _note(self, place: int, tick: Tick) -> None:
        name = self._names[place]
        self.metrics.note(name, tick)
        for ticket in tick.tickets:
            if (begun := self._begun.pop(ticket, None)) is not None:
                waited = time.monotonic() - begun - tick.seconds
                self.metrics.queue_seconds.labels(name, ticket.level).observe(max(0.0, waited))

    async def apart(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call something that takes its time beside the event loop, before the next tick where they take turns."""

        def work() -> R:
            self._turns.wait()
            return function(*args, **kwargs)

        self._turns.come()
        try:
            future = self._threads.submit(work)
        except RuntimeError:  # the server has stopped
            self._turns.go()
            raise
        future.add_done_callback(lambda _: self._turns.go())
        return await asyncio.wrap_future(future)


def _from_thread(loop: asyncio.AbstractEventLoop, watcher: Watcher, place: int) -> Callable[[Seen], None]:
    """What the thread that ticks may call, so that ``watcher`` hears of a sample in the event loop."""

    def tell(seen: Seen) -> None:
        loop.call_soon_threadsafe(watcher, place, seen)

    return tell


def _outcome(error: BaseException) -> str:
    return error.code if isinstance(error, Refused) else "failed"
