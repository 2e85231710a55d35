"""What the serving bench compares lanes with: stand in the place of ``Lanes`` behind the same server.

Each has what the server asks of lanes, and plays whole requests: the earliest deadline first, of those without one the
shortest. A deadline that cannot be kept is refused as lanes refuse it.
"""

import itertools
import threading
import time
from math import inf
from typing import NamedTuple

import numpy as np

from bench.serving_told import late_ones, next_batch, together
from cachec.runtime.errors import DeadlineError
from cachec.runtime.lane_costs import pace_after
from cachec.runtime.lane_request import Tick, Ticket
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

BATCHES = (1, 2, 4, 8)


class Waiting(NamedTuple):
    """A request in the queue; those that are ``alike`` may share a batch. ``after``: of its own once it was played."""

    ticket: Ticket
    alike: tuple
    seconds: float
    conditions: dict
    seed: int
    deadline: float
    after: float

    @property
    def order(self):
        return self.deadline, self.seconds, self.ticket.number


class Whole:
    """A queue of requests; ``play`` makes the latents of some that are alike."""

    def __init__(self, served, most):
        self._served, self._most = served, most
        self._kinds = served.lanes.kind
        self._queue, self._numbers, self._lock = [], itertools.count(), threading.Lock()
        self.num_running, self._until, self._pace = 0, 0.0, 1.0

    def kind(self, level=None, **where):
        return self._kinds(level, **where)

    @property
    def num_queued(self):
        return len(self._queue)

    def expected_ends(self):
        return {one.ticket.number: one.seconds for one in self._queue}

    def latents(self, ticket):
        return None

    def submit(self, conditions, *, seed, level=None, steps=None, size=None, start=0, deadline=None, after=0.0):
        bundle, now = self._served.loaded.at(size, steps), time.monotonic()
        ticket = Ticket(next(self._numbers), level, bundle.programs[level].num_steps)
        alike, until = (size, steps, level), inf if deadline is None else now + deadline
        with self._lock:
            one = Waiting(ticket, alike, self.seconds(alike, 1), dict(conditions), seed, until, after)
            if deadline is not None:
                self._check_deadline(one, now)
            self._queue.append(one)
        return ticket

    def seconds(self, alike, many):
        """What so many requests take together, by their calls' costs."""
        size, steps, level = alike
        return together(self.kind(level, steps=steps, size=size), many)

    def _check_deadline(self, one, now):
        """Raise ``DeadlineError`` unless it can be in time, and those that were taken stay so."""
        queue = [other for other in self._queue if not other.ticket.done]
        late = self._late([*queue, one], now)
        if late and late - self._late(queue, now):
            raise DeadlineError("the deadline, or one that was promised before, would not be kept: give it more time", 1.0)

    def _late(self, queue, now):
        return late_ones(queue, max(now, self._until), self._most, lambda *given: self._pace * self.seconds(*given))

    def tick(self):
        """The most urgent request, with as many like it as fit into a batch, from its first step to its last."""
        with self._lock:
            self._queue = [one for one in self._queue if not one.ticket.done]
            if not self._queue:
                return None
            chosen, self._queue = next_batch(self._queue, self._most)
            begun, self.num_running = time.monotonic(), len(chosen)
            alike = chosen[0].alike
            reckoned = self.seconds(alike, len(chosen))
            self._until = begun + self._pace * reckoned + sum(one.after for one in chosen)
        made = self.play(alike, [one.conditions for one in chosen], [one.seed for one in chosen])
        self.num_running = 0
        tickets = tuple(one.ticket for one in chosen)
        for ticket, latents in zip(tickets, made, strict=True):
            ticket.step = ticket.num_steps
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_result(latents[None])
        seconds = time.monotonic() - begun
        self._pace = pace_after(self._pace, seconds, reckoned)
        return Tick(tickets, len(tickets), tickets, seconds, reckoned)


class WholeBatches(Whole):
    """Batches of requests of one level, with the cache, on sessions of ``BATCHES``."""

    def __init__(self, served, most):
        super().__init__(served, most)
        self._sessions = {}

    def bind(self, alike):
        """Make ready for requests of this size, number of steps and level."""
        size, steps, level = alike
        for batch in BATCHES:
            self._sessions[alike, batch] = self._served.loaded.at(size, steps).session(batch=batch, level=level)

    def play(self, alike, conditions, seeds):
        batch = next(size for size in BATCHES if size >= len(seeds))
        session = self._sessions[alike, batch]
        places = [min(place, len(seeds) - 1) for place in range(batch)]
        given = {name: np.concatenate([conditions[place][name] for place in places]) for name in conditions[0]}
        noise = np.stack([make_noise(seeds[place], session.latent_shape[1:]) for place in places])
        return session.run(given, noise)[: len(seeds)].copy()


def compute_all(served):
    """Let requests of every level compute every step."""
    submit = served.lanes.submit

    def uncached(*given, level=None, **rest):
        return submit(*given, level=UNCACHED, **rest)

    served.lanes.submit = uncached


class Eager(Whole):
    """diffusers' own loop under PyTorch, one request at a time, every step computed. Needs the extra ``compile``."""

    def __init__(self, served):
        super().__init__(served, most=1)
        from cachec.compiler.models import find_model, load_model
        from cachec.compiler.models.base import settings_of

        manifest = served.loaded.manifest
        self._model = load_model(find_model(manifest.model["source"]))
        self._settings, self._shape = settings_of(manifest), served.loaded.session().latent_shape[1:]
        self._took = 0.0

    def seconds(self, alike, many):
        """As the last one took: the bundle's costs are of its engines."""
        return self._took

    def play(self, alike, conditions, seeds):
        noise, begun = make_noise(seeds[0], self._shape)[None], time.monotonic()
        made = self._model.generate(conditions[0], noise, self._settings)
        self._took = time.monotonic() - begun
        return made
