"""A request of ``lanes``: the ticket that its sender holds, and what is known of it on its way."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from cachec.runtime.binding import not_finite
from cachec.runtime.errors import EngineError
from cachec.runtime.lane_plan import LaneCall, LanePlan
from cachec.runtime.specs import Array

Key = tuple[int, str, int]  # which size and number of steps, by its place; the level; the step it begins at


@dataclass(eq=False)
class Ticket:
    """A request that was taken. ``future`` is how it ends: with its latents [1, …], an error, or cancelled, at any time.

    ``step``: of its ``num_steps`` so many are done.
    """

    number: int
    level: str
    num_steps: int
    step: int = 0
    future: "Future[Array]" = field(default_factory=Future)

    def result(self, timeout: float | None = None) -> Array:
        """The latents [1, …], a numpy array of its own; waits for them, at most ``timeout`` seconds.

        Raises:
            EngineError: the request failed; says where.
            TimeoutError, concurrent.futures.CancelledError: it is not done, or was cancelled.
        """
        return self.future.result(timeout)

    @property
    def done(self) -> bool:
        """Is there a result, an error, or was it cancelled?"""
        return self.future.done()

    def cancel(self) -> bool:
        """Let go of it; its lane is free from the next tick on. ``False``: it was done already."""
        return self.future.cancel()


@dataclass(frozen=True)
class Tick:
    """What a tick did: whose step it was, on how many rows, and who is done or has failed.

    ``seconds``: what it took; ``reckoned``: what it should have by the costs.
    """

    tickets: tuple[Ticket, ...]
    rows: int
    ended: tuple[Ticket, ...]
    seconds: float
    reckoned: float


@dataclass(eq=False)
class Request:
    """A request on its way. ``made``: so many of its calls are made."""

    ticket: Ticket
    key: Key
    plan: LanePlan
    conditions: Mapping[str, Array]
    noise: Array
    digest: bytes
    lane: int | None = None
    has_begun: bool = False
    made: int = 0
    error: EngineError | None = None

    @property
    def next_call(self) -> LaneCall:
        return self.plan.calls[self.made]

    def check_latents(self, latents: Array) -> None:
        """Note an error if they are not all numbers."""
        if not np.isfinite(latents).all():
            ticket = self.ticket
            self.error = not_finite(f"the latents of request {ticket.number}", ticket.level, f"after step {ticket.step - 1}")

    def fail(self, error: EngineError) -> None:
        """It ends with this error, which then says whose it is."""
        self.error = type(error)(f"request {self.ticket.number}: {error}")

    def deliver(self, latents: Array | None) -> None:
        """Tell whoever waits, unless the request was cancelled meanwhile."""
        future = self.ticket.future
        if not future.set_running_or_notify_cancel():
            return
        if latents is None or self.error is not None:
            future.set_exception(self.error or EngineError(f"request {self.ticket.number} has no latents"))
        else:
            future.set_result(latents)
