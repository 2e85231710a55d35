"""Who does which pieces of the work: this process alone, or workers beside it, each with a tool of its own.

Pieces know nothing of each other and are done in any order. A worker does one at a time, and gets the next when it is done;
what a worker had that dies goes to another. Workers are started by ``processes.py``, one for each device of this machine, or
by ``ray_actors.py``, on a cluster.
"""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cachec.runtime.errors import CachecError, EngineError
from cachec.runtime.files import write_file
from cachec.runtime.version import VERSION

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds without any worker at work, after which that is said

Facts = TypeVar("Facts")
Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], object]  # is told how much more is done


def no_tick(_: int) -> None:
    """Nobody looks on."""


class Tool(ABC, Generic[Facts, Task, Result]):
    """What the work is done with: a model on some device. Facts, tasks and results may be sent to another process."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What those who hand out the work must know of it. Tools of different facts do not work together."""

    @abstractmethod
    def do(self, task: Task, tick: Tick) -> Result:
        """Do one piece of the work."""


@dataclass(frozen=True)
class Place:
    """Where a tool works: the device that it is given, and the CPU threads; ``None`` leaves it the choice."""

    device: str | None = None
    threads: int | None = None


class Recipe(ABC, Generic[Facts, Task, Result]):
    """How a worker makes its tool. It is sent to the worker's process, and so are the modules' names that it needs."""

    @abstractmethod
    def open(self, place: Place) -> AbstractContextManager[Tool[Facts, Task, Result]]:
        """The tool, for as long as the worker lives."""


@dataclass(frozen=True)
class Made:
    """An answer: the facts of an opened tool, or the result of a task."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """An answer: what was asked for cannot be done, by no worker."""

    error: CachecError


@dataclass(frozen=True)
class Lost:
    """The worker is gone, and says nothing any more."""

    reason: str


Answer = Made | Failed | Lost


class Worker:
    """The worker's own side: it opens a tool and works with it. Only what ``cachec`` raises on purpose is an answer."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._tool: Tool[Any, Any, Any] | None = None

    def open(self, recipe: Recipe[Any, Any, Any], place: Place) -> Answer:
        """Make the tool; its facts, and the version of this package."""
        try:
            self._tool = self._stack.enter_context(recipe.open(place))
            return Made((VERSION, self._tool.facts))
        except CachecError as error:
            return Failed(error)

    def do(self, task: Any) -> Answer:
        """Do one task."""
        assert self._tool is not None, "workers are opened first"
        try:
            return Made(self._tool.do(task, no_tick))
        except CachecError as error:
            return Failed(error)

    def close(self) -> None:
        self._stack.close()


class Hands(ABC):
    """Started workers. Each answers once when its tool is open, and then once to every task."""

    names: Sequence[str]

    @abstractmethod
    def give(self, worker: int, task: Any) -> None:
        """Send a task to a worker that has answered all it was given."""

    @abstractmethod
    def hear(self, seconds: float) -> list[tuple[int, Answer]]:
        """Answers with the numbers of the workers that gave them; waits so long for the first."""


class Crew(ABC):
    """A way to start workers."""

    @abstractmethod
    def start(self, recipe: Recipe[Any, Any, Any]) -> AbstractContextManager[Hands]:
        """Workers with tools of this recipe, which end with the block, however it ends."""


class Team(ABC, Generic[Facts, Task, Result]):
    """Whoever does the work."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many tools are at work."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Those of its tools."""

    @abstractmethod
    def do(self, tasks: Sequence[Task], tick: Tick = no_tick) -> Iterator[tuple[int, Result]]:
        """Do all tasks; the results as they come, each with the place of its task. ``tick`` may be told of parts of tasks.

        Raises:
            CachecError: that of the first task that cannot be done.
        """


class Alone(Team[Facts, Task, Result]):
    """This process, with one tool."""

    def __init__(self, tool: Tool[Facts, Task, Result]) -> None:
        self._tool = tool

    @property
    def size(self) -> int:
        return 1

    @property
    def facts(self) -> Facts:
        return self._tool.facts

    def do(self, tasks: Sequence[Task], tick: Tick = no_tick) -> Iterator[tuple[int, Result]]:
        for place, task in enumerate(tasks):
            yield place, self._tool.do(task, tick)


class Workers(Team[Facts, Task, Result]):
    """Workers beside this process. Those that are slow to start join when they are ready."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._starting, self._idle = set(range(len(hands.names))), deque[int]()
        self._busy: dict[int, int] = {}  # worker -> the place of its task
        self._told = False  # that nobody works
        self._opened: tuple[str, Facts] | None = None
        while self._opened is None:
            self._listen()

    @property
    def size(self) -> int:
        return len(self._starting) + len(self._idle) + len(self._busy)

    @property
    def facts(self) -> Facts:
        assert self._opened is not None, "waited for"
        return self._opened[1]

    def do(self, tasks: Sequence[Task], tick: Tick = no_tick) -> Iterator[tuple[int, Result]]:
        waiting = deque(range(len(tasks)))
        while waiting or self._busy:
            while waiting and self._idle:
                worker, place = self._idle.popleft(), waiting.popleft()
                self._busy[worker] = place
                self._hands.give(worker, tasks[place])
            done, dropped = self._listen()
            waiting.extendleft(dropped)
            yield from done

    def _listen(self) -> tuple[list[tuple[int, Result]], list[int]]:
        """What was done, and the places of tasks that must be given to others.

        Raises:
            CachecError: a worker's.
            EngineError: no worker is left.
        """
        done, dropped = [], []
        heard = self._hands.hear(PATIENCE)
        for worker, answer in heard:
            place = self._busy.pop(worker, None)
            self._starting.discard(worker)
            if isinstance(answer, Failed):
                raise answer.error
            if isinstance(answer, Lost):
                dropped += [] if place is None else [place]
                self._say_lost(worker, answer, has_task=place is not None)
                continue
            self._idle.append(worker)
            if place is None:
                self._welcome(worker, answer.value)
            else:
                done.append((place, answer.value))
        if not heard and not self._busy and not self._idle and not self._told:
            log.warning("no worker has started yet: other work may have all that they need. Waiting for %s", self._waited_for())
            self._told = True
        return done, dropped

    def _welcome(self, worker: int, opened: tuple[str, Facts]) -> None:
        if self._opened is None:
            self._opened = opened
        if opened != self._opened:
            raise EngineError(
                f"workers are unlike each other: {self._hands.names[worker]} has {opened}, another has {self._opened}. "
                "Give all of them one version of cachec, one model and one kind of device"
            )
        log.info("worker %s is ready", self._hands.names[worker])

    def _say_lost(self, worker: int, answer: Lost, *, has_task: bool) -> None:
        name, left = self._hands.names[worker], self.size
        if left == 0:
            raise EngineError(
                f"no worker is left: the last one, {name}, {answer.reason}. What was finished is kept where the command has "
                "files to keep it in, and the same command goes on from there"
            )
        took = "its prompts go to the others" if has_task else "it had nothing to do"
        log.warning("worker %s %s: %s, %d are left", name, answer.reason, took, left)

    def _waited_for(self) -> str:
        return ", ".join(self._hands.names[worker] for worker in sorted(self._starting))


@contextmanager
def at_work(crew: Crew, recipe: Recipe[Facts, Task, Result]) -> Iterator[Workers[Facts, Task, Result]]:
    """Workers with tools of this recipe.

    Raises:
        CachecError: a tool cannot be opened.
        EngineError: all workers died.
    """
    with crew.start(recipe) as hands:
        yield Workers(hands)


@dataclass(frozen=True, eq=False)
class Kept(Generic[Result]):
    """Results as files of a work folder, which an interrupted run goes on from. ``None``: they are kept in memory only."""

    work: Path | None
    dump: Callable[[Result], bytes]
    load: Callable[[Path], Result]


def do_pieces(
    team: Team[Facts, Task, Result],
    pieces: Mapping[str, Task],
    kept: Kept[Result],
    *,
    tick: Tick = no_tick,
    done: Callable[[str], object],
) -> list[Result]:
    """Results of all ``pieces`` by the names of their files, in order. Those whose files are there are not made again.

    ``done`` is told the name of each piece that is there.
    """
    files = {} if kept.work is None else {name: kept.work / name for name in pieces}
    there = [name for name, path in files.items() if path.exists()]
    for name in there:
        done(name)
    left, made = [name for name in pieces if name not in there], {}
    for place, result in team.do([pieces[name] for name in left], tick) if left else ():
        if kept.work is None:
            made[left[place]] = result
        else:
            write_file(files[left[place]], kept.dump(result))
        done(left[place])
    return [made[name] if name in made else kept.load(files[name]) for name in pieces]
