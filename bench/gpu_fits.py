"""Calibration and training of ``bench.gpu_check``: the model where it belongs, and what crosses to the host.

Conditions are noise of the right shapes, one for each prompt's number: what is measured is time, memory and bytes, not quality.
Bytes are counted at the evaluator's border, where noise, conditions and results cross and nothing else does.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bench.gpu_rows import Case
from bench.peers import synchronize
from cachec.compiler.calibration.evaluator import Conditions, Evaluator, Numbers, Time
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, record_trajectories, recording_here
from cachec.compiler.calibration.statistics import record_statistics
from cachec.compiler.calibration.uses import Use, UsedPrompts
from cachec.compiler.graphs.costs import samples_at_once
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.lesa_training import LesaTrainer
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

INTERVAL = 7  # LESA's N


@dataclass(eq=False)
class Counted(Evaluator):
    """An evaluator that counts what it is asked, what crosses its border, and the seconds inside it."""

    inner: GraphEvaluator
    samples: int = 0
    to_host: int = 0
    to_device: int = 0
    seconds: float = 0.0
    name: ClassVar[str] = GraphEvaluator.name

    def __post_init__(self) -> None:
        self.device, self.precision, self.max_batch = self.inner.device, self.inner.precision, self.inner.max_batch

    def evaluate(self, x: Array, t: Time, conditions: Conditions) -> tuple[Array, Array]:
        start = time.perf_counter()
        velocity, feature = self.inner.evaluate(x, t, conditions)
        self._count(len(x), (x, *conditions.values()), (velocity, feature), start)
        return velocity, feature

    def tail(self, feature: Array, t: Time, conditions: Conditions) -> Array:
        start = time.perf_counter()
        velocity = self.inner.tail(feature, t, conditions)
        self._count(0, (feature, *conditions.values()), (velocity,), start)
        return velocity

    def play(
        self, program: Program, noise: Array, conditions: Conditions, *, coefficients: Numbers = None, timesteps: Numbers = None
    ) -> Array:
        return self.inner.play(program, noise, conditions, coefficients=coefficients, timesteps=timesteps)

    def _count(self, samples: int, given: Sequence[Array], results: Sequence[Array], start: float) -> None:
        self.seconds += time.perf_counter() - start
        self.samples += samples
        self.to_device += sum(array.nbytes for array in given)
        self.to_host += sum(array.nbytes for array in results)


def fit_case(case: Case, *, prompts: int, updates: int) -> dict[str, Any]:
    """Calibrate on ``prompts`` and train LESA for about ``updates`` on half of them, with the model on the case's device."""
    start = time.perf_counter()
    with torch.no_grad():
        split = prepare(case.model, case.settings)
        inner = GraphEvaluator(
            split,
            case.model.io,
            device=str(case.device),
            precision=case.settings.dtype,
            max_batch=samples_at_once(split),
        )
    facts: dict[str, Any] = {"prepare_seconds": time.perf_counter() - start, "steps": case.settings.steps, "prompts": prompts}
    subject = _subject(case)
    facts["batch"] = min(samples_at_once(split), prompts)
    facts["bare_seconds_a_step"] = _time_bare(case, inner, subject, facts["batch"])
    facts["calibrate"] = _measured(case, inner, lambda counted: _calibrate(subject, counted, prompts))
    facts["train"] = _measured(case, inner, lambda counted: _train(subject, counted, max(2, prompts // 2), updates))
    return facts


def _subject(case: Case) -> Subject:
    shapes = {name: tuple(value.shape[1:]) for name, value in case.conditions.items()}

    def encode(prompts: Sequence[str]) -> dict[str, Array]:
        numbers = [np.random.default_rng(int(prompt.split()[-1])) for prompt in prompts]
        made = {
            name: np.stack([rng.standard_normal(shape, np.float32) for rng in numbers])
            for name, shape in shapes.items()
            if shape
        }
        scalars = {name: case.conditions[name].float().cpu().numpy() for name, shape in shapes.items() if not shape}
        return made | {name: np.repeat(value, len(prompts)) for name, value in scalars.items()}

    return Subject(
        name=case.name,
        weights_hash="random",
        sampler=case.model.sampler,
        settings=case.settings,
        latent_shape=tuple(case.noise.shape[1:]),
        sampling=lambda steps: case.model.sampling(case.settings) if steps == case.settings.steps else _no(steps),
        encode=encode,
    )


def _no(steps: int) -> Sampling:
    raise ValueError(f"nothing here is sampled in {steps} steps")


@torch.no_grad()
def _time_bare(case: Case, inner: GraphEvaluator, subject: Subject, batch: int) -> float:
    """Seconds a step and prompt of the same graphs in the same batch, of tensors that stay on the device; median of three."""
    conditions = {
        name: torch.from_numpy(value).to(case.device)
        for name, value in subject.encode([f"prompt {number}" for number in range(batch)]).items()
    }
    x, t = torch.randn(batch, *subject.latent_shape, device=case.device), torch.ones((), device=case.device)
    seconds = []
    for _ in range(4):
        synchronize(case.device)
        start = time.perf_counter()
        inner.evaluate_with_gradients(x, t, conditions)
        synchronize(case.device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / batch


def _measured(case: Case, inner: GraphEvaluator, work: Any) -> dict[str, Any]:
    """What ``work`` says, with its seconds, its traffic and the device's peak memory."""
    counted = Counted(inner)
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
    start = time.perf_counter()
    facts: dict[str, Any] = work(counted)
    seconds = time.perf_counter() - start
    facts |= {
        "seconds": seconds,
        "seconds_in_evaluator": counted.seconds,
        "evaluations": counted.samples,
        "bytes_to_host": counted.to_host,
        "bytes_to_device": counted.to_device,
    }
    if case.device.type == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(case.device)
    return facts


def _prompts(num: int, first: int) -> UsedPrompts:
    uses: list[Use] = ["stop" if number % 4 == 3 else "fit" for number in range(num)]
    if "stop" not in uses:
        uses[-1] = "stop"
    return UsedPrompts(tuple(f"prompt {first + number}" for number in range(num)), tuple(uses))


def _calibrate(subject: Subject, evaluator: Counted, prompts: int) -> dict[str, Any]:
    statistics = record_statistics(
        subject, recording_here(subject, evaluator), _prompts(prompts, 0), reference_steps=0, seed=0, work=None
    )
    gram = statistics.velocity_gram
    return {"feature_tokens": int(statistics.facts["feature_tokens"]), "finite": bool(np.isfinite(gram).all())}


def _train(subject: Subject, evaluator: Counted, prompts: int, updates: int) -> dict[str, Any]:
    used = _prompts(prompts, 1000)
    schedule = Lesa().interval(subject.settings.steps, INTERVAL)
    rounds = max(1, round(updates / 2 / len(schedule.forecast)))
    with tempfile.TemporaryDirectory(prefix="cachec-") as folder:
        start = time.perf_counter()
        runs = record_trajectories(subject, recording_here(subject, evaluator), used.prompts, seed=0, work=Path(folder))
        recorded = time.perf_counter() - start
        train, held_out = (runs.select(np.array(used.places(use))) for use in ("fit", "stop"))
        data = TrainingData(evaluator, subject.own_sampling, train, held_out, schedule, 0, Path(folder))
        trainer = LesaTrainer(data, max_rounds=rounds)
        trainer.run()
    curve = trainer.state.curve
    return {
        "prompts": prompts,
        "computed": list(schedule.compute),
        "recording_seconds": recorded,
        "updates": trainer.state.updates,
        "training_seconds": trainer.state.seconds,
        "token_subset": len(runs.tokens),
        "held_out_first": curve[0]["held_out_latent_rel_l2"],
        "held_out_best": trainer.state.best,
    }
