"""The one thread that owns all lanes of a server and ticks them, and who is told what they did."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachec.runtime.errors import CachecError, EngineError
from cachec.runtime.lane_request import Tick, Ticket
from cachec.runtime.lanes import Lanes
from cachec.runtime.specs import Array
from cachec.serving.turns import Turns

log = logging.getLogger(__name__)
LOOKS = 0.5  # seconds after which it looks whether it was told to stop
KEPT = 0.99  # of what was seen between ticks before, beside one more


@dataclass(frozen=True)
class Seen:
    """How far a request is: ``step`` steps are done, ``latents`` [1, …] where they were asked for."""

    step: int
    latents: Array | None


class Ticker:
    """``note`` hears of every tick: the place of its lanes, and what it did. Watchers hear of their own request's.

    Both are called in the thread that ticks, which they must not hold up. ``turns``: when it may tick.
    """

    def __init__(self, lanes: Sequence[Lanes], note: Callable[[int, Tick], None], turns: Turns) -> None:
        self._lanes, self._note, self._turns = tuple(lanes), note, turns
        self._wake, self._stopping = threading.Event(), False
        self._watchers = dict[Ticket, tuple[Callable[[Seen], None], bool]]()
        self._waiting = set[Ticket]()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="cachec-lanes", daemon=True)
        self._between, self._ended = 0.0, 0.0  # seconds between ticks, and requests that were done: the latest count most
        self._last: tuple[float, int] | None = None  # when the last tick ended with some left, and how many it has ended
        self.failure: Exception | None = None

    @property
    def seconds_between(self) -> float | None:
        """What goes by before the next tick for each request that is done, while others wait; ``None``: not seen yet."""
        return self._between / self._ended if self._ended >= 1 else None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its tick; whoever still waits gets an error."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._give_up(EngineError("the server has stopped"))

    def submit(
        self, submit: Callable[[], Ticket], watcher: Callable[[Seen], None] | None = None, *, latents: bool = False
    ) -> Ticket:
        """Take a request; ``watcher`` hears of its steps, and gets the latents, too, if it is to.

        Raises:
            EngineError: the lanes stand still, as a tick failed as no tick should.
        """
        if self.failure is not None:
            raise EngineError(f"the lanes stand still: {self.failure}")
        with self._lock:  # the thread tells nobody of a request's first step before its watcher is known
            ticket = submit()
            self._waiting.add(ticket)
            if watcher is not None:
                self._watchers[ticket] = watcher, latents
        self._wake.set()
        return ticket

    def wake(self) -> None:
        """There is something to do: a request was cancelled."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(LOOKS)
            self._wake.clear()
            try:
                while not self._stopping and self._round():
                    pass
            except Exception as error:
                log.exception("the lanes stand still: a tick failed")
                self.failure = error
                self._give_up(EngineError(f"the lanes stand still: {error}"))
                return

    def _round(self) -> bool:
        """A tick of each lanes that have something to do; had any?"""
        busy = False
        for place, lanes in enumerate(self._lanes):
            with self._turns.tick():
                begun = time.monotonic()
                tick = lanes.tick()
            if tick is None:
                continue
            busy = True
            self._reckon(begun, len(tick.ended))
            self._note(place, tick)
            self._tell(lanes, tick)
        return busy

    def _reckon(self, begun: float, ended: int) -> None:
        """A tick that began then is over, and so are so many requests.

        Only what follows the end of some counts: beside others it is encoding those who come, however few of them are taken.
        """
        if self._last is not None and self._last[1]:
            before, done = self._last
            self._between, self._ended = KEPT * self._between + begun - before, KEPT * self._ended + done
        left = any(lanes.num_queued + lanes.num_running for lanes in self._lanes)
        self._last = (time.monotonic(), ended) if left else None

    def _tell(self, lanes: Lanes, tick: Tick) -> None:
        with self._lock:
            watching = [(ticket, *self._watchers[ticket]) for ticket in tick.tickets if ticket in self._watchers]
            for ticket in [one for one in self._waiting if one.done]:
                self._waiting.discard(ticket)
                self._watchers.pop(ticket, None)
        for ticket, watcher, wants in watching:
            watcher(Seen(ticket.step, lanes.latents(ticket) if wants else None))

    def _give_up(self, error: CachecError) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
            self._watchers.clear()
        for ticket in waiting:
            if not ticket.done and ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(error)
