"""Whose work the machine does now, where lanes, text encoders and decoder run on the same cores."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Ticks of lanes take turns with what comes before and after them; what is ``ahead`` goes first, as it is short.

    Two engines that each want all cores wait for each other's threads: on two cores, ticks of tiny-flux took 3.3 times as
    long beside its decoder, which took 2.4 times as long (``git show 2a0c889:bench/SERVING.md``), where turns would give 2.
    Not ``on``: nobody waits for anybody, as engines have cores, or a GPU, of their own.
    """

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self._changed = threading.Condition()
        self._ahead, self._ticking = 0, False

    def come(self) -> None:
        """Something is to be done before the next tick; :meth:`go` when it was, or will not be."""
        with self._changed:
            self._ahead += 1

    def go(self) -> None:
        """It is done, or cancelled."""
        with self._changed:
            self._ahead -= 1
            self._changed.notify_all()

    def hold(self) -> "Held":
        """For a request whose steps lead to something that is to be done before the next tick."""
        return Held(self)

    def wait(self) -> None:
        """Until no tick is on its way. For who has come: the next tick waits for them to go."""
        with self._changed:
            self._changed.wait_for(lambda: not (self.on and self._ticking))

    @contextmanager
    def tick(self) -> Iterator[None]:
        """A tick, when nothing is ahead."""
        with self._changed:
            self._changed.wait_for(lambda: not (self.on and self._ahead))
            self._ticking = True
        try:
            yield
        finally:
            with self._changed:
                self._ticking = False
                self._changed.notify_all()


class Held:
    """One request's place ahead of the next tick, from its last step on: what comes then is asked for by another thread."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._lock, self._taken, self._ended = turns, threading.Lock(), False, False

    def take(self) -> None:
        """In the thread that ticks, before its tick ends. Of no effect when it was let go already."""
        with self._lock:
            if not self._ended and not self._taken:
                self._taken = True
                self._turns.come()

    def let_go(self) -> None:
        """Whatever became of the request: ticks may go on."""
        with self._lock:
            if self._taken and not self._ended:
                self._turns.go()
            self._ended = True
