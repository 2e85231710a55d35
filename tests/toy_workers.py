"""Recorders of a formula, that workers open in processes of their own in no time; one of them kills itself while it works."""

import os
import signal
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.runs import Recorder, Subject, WantedRun, record_runs, recording_here
from cachec.compiler.calibration.workers import Recipe
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise

PROMPTS = tuple(f"a circle of size {size}" for size in range(9))
CHUNK, SHAPE = 2, (4, 5)
SETTINGS = Settings(height=16, width=16, text_tokens=1, guidance=1.0, steps=6, dtype="float32")


class Formula(Evaluator):
    """Velocities that bend with latents, time and prompt."""

    name = "a formula"

    def evaluate(self, x, t, conditions):
        feature = np.tanh(x + np.float32(np.sin(2 * t)) * conditions["prompt"])
        return np.sin(2 * feature) - x, feature

    def tail(self, feature, t, conditions):
        raise NotImplementedError

    def play(self, program, noise, conditions, *, coefficients=None, timesteps=None):
        raise NotImplementedError


def sampling(steps):
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    return Sampling(sigmas, sigmas[:-1])


def encode(prompts):
    return {"prompt": np.stack([make_noise(zlib.crc32(prompt.encode()), SHAPE) for prompt in prompts])}


SUBJECT = Subject("formula", "a" * 64, "FlowEuler", SETTINGS, SHAPE, sampling, encode)


class Dying(Recorder):
    """Kills its process, and leaves ``mark``, at its second batch, unless another has."""

    def __init__(self, mark):
        super().__init__(SUBJECT, Formula())
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
class FormulaRecorder(Recipe):
    """``mark``: one worker dies, once. ``refused``: it cannot be opened."""

    mark: Path | None = None
    refused: str | None = None

    @contextmanager
    def open(self, place):
        if self.refused is not None:
            raise InputError(self.refused)
        yield Recorder(SUBJECT, Formula()) if self.mark is None else Dying(self.mark)


@dataclass(frozen=True)
class KeepEnds:
    """Final latents and the last feature."""

    def __call__(self, steps):
        step = list(steps)[-1]
        return {"final": step.latents, "feature": step.feature}


def record(recorders, work):
    """Runs of all prompts."""
    wanted = [WantedRun(SUBJECT.own_sampling, KeepEnds())]
    return record_runs(recorders, PROMPTS, wanted, seeds=range(len(PROMPTS)), chunk=CHUNK, work=work, title="recording")


def check_death(recorders, folder):
    """With workers of which one kills itself at work, results are those of one process, which goes on from their files."""
    made = record(recorders, folder / "work")
    assert recorders.size == 1
    assert (folder / "died").exists()
    alone = record(recording_here(SUBJECT, Formula()), None)
    assert made.keys() == alone.keys()
    assert len(made["final"]) == len(PROMPTS)
    for name, values in alone.items():
        np.testing.assert_allclose(made[name], values, atol=1e-6)
    again = record(recording_here(SUBJECT, None), folder / "work")
    np.testing.assert_array_equal(again["final"], made["final"])
    (folder / "work" / "runs-0004.safetensors").unlink()  # and they go on from those of one process
    np.testing.assert_allclose(record(recorders, folder / "work")["final"], alone["final"], atol=1e-6)
