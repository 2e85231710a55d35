"""Workers as processes of this machine, one for each device."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from cachec.compiler.calibration.workers import Answer, Crew, Hands, Lost, Place, Recipe, Worker

SECONDS_TO_END = 10.0  # before a process is ended by force


@dataclass(frozen=True)
class ProcessCrew(Crew):
    """A process for each place. Each is a fresh interpreter: CUDA cannot be used in a forked one."""

    places: tuple[Place, ...]

    @contextmanager
    def start(self, recipe: Recipe[Any, Any, Any]) -> Iterator["Processes"]:
        context = multiprocessing.get_context("spawn")
        started: list[tuple[SpawnProcess, Connection]] = []
        names = []
        try:
            for place in self.places:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, recipe, place), daemon=True)
                process.start()
                theirs.close()  # so that its end is seen when the process ends
                started.append((process, ours))
                names.append(f"{place.device} (process {process.pid})")
            yield Processes(names, started)
            for _, connection in started:
                connection.close()  # they end by themselves
            for process, _ in started:
                process.join(SECONDS_TO_END)
        finally:
            for process, connection in started:
                connection.close()
                process.kill()
                process.join()


class Processes(Hands):
    """Processes that work; each has a pipe to this one."""

    def __init__(self, names: Sequence[str], started: Sequence[tuple[SpawnProcess, Connection]]) -> None:
        self.names = names
        self._connections = [connection for _, connection in started]
        self._processes = [process for process, _ in started]
        self._listened = {connection: worker for worker, connection in enumerate(self._connections)}

    def give(self, worker: int, task: Any) -> None:
        with suppress(OSError):  # it is dead, which the next listening finds
            self._connections[worker].send(task)

    def hear(self, seconds: float) -> list[tuple[int, Answer]]:
        heard: list[tuple[int, Answer]] = []
        for connection in wait(list(self._listened), seconds):
            assert isinstance(connection, Connection)
            worker = self._listened[connection]
            try:
                heard.append((worker, connection.recv()))
            except (EOFError, OSError):  # the process ended, perhaps in the middle of an answer
                del self._listened[connection]
                heard.append((worker, Lost(self._end_of(worker))))
        return heard

    def _end_of(self, worker: int) -> str:
        process = self._processes[worker]
        process.join(SECONDS_TO_END)
        code = process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _serve(connection: Connection, recipe: Recipe[Any, Any, Any], place: Place) -> None:
    """The process: answer what is asked, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out the work, which then ends this one
    with closing(Worker()) as worker, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(worker.open(recipe, place))
        while True:
            connection.send(worker.do(connection.recv()))
