"""Handing out work: everything once, what a dead worker had again, and no more than workers that are alike."""

import logging
from collections import deque

import pytest

from cachec.compiler.calibration import workers as module
from cachec.compiler.calibration.workers import Alone, Failed, Hands, Kept, Lost, Made, Tool, Worker, Workers, do_pieces
from cachec.runtime.errors import EngineError, InputError

OPENED = Made(("0", "facts"))


class Scripted(Hands):
    """Answers in turn: each worker its first, then each its second, and so on."""

    def __init__(self, *scripts):
        self.names = [f"w{number}" for number in range(len(scripts))]
        self._scripts = [deque(script) for script in scripts]
        self._asked = deque(range(len(scripts)))
        self.given = []

    def give(self, worker, task):
        self.given.append((worker, task))
        self._asked.append(worker)

    def hear(self, seconds):
        if not self._asked:
            return []
        worker = self._asked.popleft()
        answer = self._scripts[worker].popleft() if self._scripts[worker] else None
        return [(worker, Made(f"{dict(self.given)[worker]} by w{worker}") if answer is None else answer)]


def test_every_task_is_done_once_by_whoever_is_free():
    team = Workers(Scripted([OPENED], [OPENED]))
    assert (team.facts, team.size) == ("facts", 2)
    done = dict(team.do(["a", "b", "c"]))
    assert {place: result[0] for place, result in done.items()} == {0: "a", 1: "b", 2: "c"}
    assert {result[-2:] for result in done.values()} == {"w0", "w1"}


def test_what_a_dead_worker_had_goes_to_another(caplog):
    hands = Scripted([OPENED, Lost("was killed by SIGKILL")], [OPENED])
    done = dict(Workers(hands).do(["a", "b", "c"]))
    assert done.keys() == {0, 1, 2}
    assert [task for _, task in hands.given].count("a") == 2
    assert all(result.endswith("by w1") for result in done.values())
    assert "worker w0 was killed by SIGKILL: its prompts go to the others, 1 are left" in caplog.text


def test_when_all_workers_are_dead_that_is_the_end():
    hands = Scripted([OPENED, Lost("was killed by SIGKILL")], [Lost("ended with exit code 1")])
    with pytest.raises(EngineError, match=r"no worker is left: the last one, w0, was killed .* the same command goes on"):
        list(Workers(hands).do(["a", "b"]))
    with pytest.raises(EngineError, match="the last one, w0, ended with exit code 1"):
        Workers(Scripted([Lost("ended with exit code 1")]))


def test_what_no_worker_can_do_is_not_tried_by_another():
    hands = Scripted([OPENED, Failed(InputError("prompt 1 gives NaN"))], [OPENED])
    with pytest.raises(InputError, match="prompt 1 gives NaN"):
        list(Workers(hands).do(["a", "b"]))
    with pytest.raises(InputError, match="no such model"):
        Workers(Scripted([Failed(InputError("no such model"))]))


def test_workers_that_are_unlike_do_not_work_together():
    team = Workers(Scripted([OPENED], [Made(("0", "others"))]))
    with pytest.raises(EngineError, match="unlike each other: w1 has .*others"):
        list(team.do(["a", "b", "c"]))


def test_that_nobody_has_started_is_said_once(caplog, monkeypatch):
    class Slow(Scripted):
        silent = 3

        def hear(self, seconds):
            self.silent -= 1
            return [] if self.silent >= 0 else super().hear(seconds)

    caplog.set_level(logging.WARNING)
    Workers(Slow([OPENED]))
    assert caplog.text.count("no worker has started yet") == 1


class Doubling(Tool):
    facts = 7

    def do(self, task, tick):
        if task < 0:
            raise InputError(f"{task} is negative")
        tick(1)
        return 2 * task


class Opening:
    def __init__(self, tool):
        self.tool, self.closed = tool, False

    def open(self, place):
        return self

    def __enter__(self):
        return self.tool

    def __exit__(self, *_):
        self.closed = True


def test_a_worker_answers_with_results_and_errors_and_closes_its_tool():
    worker, opening = Worker(), Opening(Doubling())
    assert worker.open(opening, module.Place()).value[1] == 7
    assert worker.do(4) == Made(8)
    answer = worker.do(-1)
    assert isinstance(answer, Failed)
    assert str(answer.error) == "-1 is negative"
    worker.close()
    assert opening.closed


def test_pieces_that_are_there_are_not_made_again(tmp_path):
    kept = Kept(tmp_path, lambda result: str(result).encode(), lambda path: int(path.read_text()))
    (tmp_path / "b").write_text("40")
    done, ticks = [], []
    pieces = {"a": 1, "b": 2, "c": 3}
    assert do_pieces(Alone(Doubling()), pieces, kept, tick=ticks.append, done=done.append) == [2, 40, 6]
    assert (sorted(done), ticks) == (["a", "b", "c"], [1, 1])
    assert do_pieces(Alone(None), pieces, kept, done=done.append) == [2, 40, 6]
    nowhere = Kept(None, kept.dump, kept.load)
    assert do_pieces(Alone(Doubling()), pieces, nowhere, done=done.append) == [2, 4, 6]
