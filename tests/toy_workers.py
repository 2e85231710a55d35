"""Recorders of the toy that workers open in processes of their own, one of which kills itself while it works."""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachec.compiler.calibration.runs import Recorder, Subject, WantedRun, record_runs
from cachec.compiler.calibration.workers import Recipe
from cachec.runtime.errors import InputError

PROMPTS = tuple(f"a circle of size {size}" for size in range(9))
CHUNK = 2


@dataclass(frozen=True)
class KeepEnds:
    """Final latents and the last feature."""

    def __call__(self, steps):
        step = list(steps)[-1]
        return {"final": step.latents, "feature": step.feature}


class Dying(Recorder):
    """Kills its process, and leaves ``mark``, at its second batch, unless another has."""

    def __init__(self, subject, evaluator, mark):
        super().__init__(subject, evaluator)
        self._mark, self._batches = mark, 0

    def do(self, task, tick):
        self._batches += 1
        if self._batches == 2:
            die_once(self._mark)
        return super().do(task, tick)


def die_once(mark):
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class ToyRecorder(Recipe):
    """The toy with the weights that it begins with. ``mark``: one worker dies, once. ``refused``: it cannot be opened."""

    mark: Path | None = None
    refused: str | None = None

    @contextmanager
    def open(self, place):
        if self.refused is not None:
            raise InputError(self.refused)
        subject, evaluator = toy_subject(), toy_evaluator()
        yield Recorder(subject, evaluator) if self.mark is None else Dying(subject, evaluator, self.mark)


def toy_subject():
    from toy_model import SETTINGS, ToyModel

    return Subject.of(ToyModel(), SETTINGS)


def toy_evaluator():
    from toy_bundle import split_toy
    from toy_model import ToyModel

    from cachec.compiler.calibration.graph_evaluator import GraphEvaluator

    return GraphEvaluator(split_toy(), ToyModel().io)


def record(recorders, work):
    """Runs of all prompts."""
    wanted = [WantedRun(toy_subject().own_sampling, KeepEnds())]
    return record_runs(recorders, PROMPTS, wanted, seeds=range(len(PROMPTS)), chunk=CHUNK, work=work, title="recording")
