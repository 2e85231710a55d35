"""Training of a student by Restricted MeanFlow (``meanflow.py``): the loop, its held-out error, and where it stops.

Data are the teacher's own pictures: the latents that its full runs of the training prompts end with, mixed with fresh noise,
x_t = (1 - t) x_0 + t e, drawn anew for each update. (On what, in what batches and for how long the paper trained was not found;
the released code holds no training.) The held-out error is of what counts: the student's run of so many steps beside the
teacher's full one from the same noise, on prompts that it is not trained on. All of the student's weights are trained, in
float32, by AdamW. What is evaluated and kept is their running average: gradients are mostly noise.

``P`` runs, ``B`` samples.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from cachec.compiler.calibration.checkpoints import read_checkpoint, write_checkpoint
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.distillation.meanflow import Distilling, draw_times, meanflow_loss
from cachec.compiler.distillation.student import Student, told_per_level
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

EVALUATIONS = 20  # of the held-out error, over a training
HELD_OUT = 8  # runs that it is taken on, at most
EXPLODED = 3.0  # times the best held-out error: what comes back from there is luck
WARM_UP = 100  # updates over which the rate rises: AdamW's first steps are of full size whatever the gradient
FALL = 0.4  # of all updates, the last ones, over which the rate falls to nothing: held-out runs of a steady rate scatter
SAVE_SECONDS = 60.0
CLIP = 1.0  # of the gradient's norm
AVERAGE = 0.99  # what a running average of the weights keeps at an update, at most

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class DistillationData:
    """What a student is trained on: the teacher with its ``evaluator``, and its runs, of which the last ``held_out`` are not.

    ``noise`` and ``final`` latents [P, …]; ``conditions`` by name [P, …], of all branches. ``sampling`` is the teacher's,
    ``few`` the student's.
    """

    model: LoadedModel
    settings: Settings
    evaluator: Evaluator
    sampling: Sampling
    few: Sampling
    noise: Array
    final: Array
    conditions: Mapping[str, Array]
    held_out: int
    seed: int
    work: Path


@dataclass
class DistillationState:
    """Where a training stands, beside the tensors. ``diverged``: why it ended before its time."""

    update: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_update: int = 0
    diverged: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)


class Distiller:
    """Trains one student; resumes from ``data.work`` if a checkpoint lies there."""

    def __init__(self, data: DistillationData, asked: Distilling) -> None:
        self._data, self._asked, self.state = data, asked, DistillationState()
        self._scale = told_per_level(data.model.spec.name, data.sampling)
        self._device = torch.device(data.evaluator.device)
        self.student = Student(data.model, data.settings, data.sampling, data.evaluator.device)
        self._parameters = list(self.student.transformer.requires_grad_(requires_grad=True).parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=asked.rate, weight_decay=0.0)
        self._mean = [parameter.detach().clone() for parameter in self._parameters]
        self._best = self._weights()
        self._levels = torch.from_numpy(np.asarray(data.sampling.sigmas, np.float32))
        self._path, self._saved = data.work / "student.checkpoint", time.perf_counter()
        if self._path.exists():
            self._load()

    def run(self, *, until: int | None = None) -> nn.Module:
        """All updates, or those before number ``until``. Returns the transformer with the best weights of those so far."""
        total = self._asked.updates
        last, every = total if until is None else until, max(1, total // EVALUATIONS)
        with tqdm(desc="distilling", unit="update", initial=self.state.update, total=total, disable=None) as bar:
            while self.state.update < last and not self.state.diverged:
                start = time.perf_counter()
                if self.state.update % every == 0:
                    self._evaluate()
                if not self.state.diverged:
                    self._update()
                    bar.update()
                self.state.seconds += time.perf_counter() - start
                bar.set_postfix_str(f"held-out runs off by {self.state.curve[-1]['held_out']:.4f}")
                if time.perf_counter() - self._saved > SAVE_SECONDS:
                    self._save()
        if self.state.update == total and not self.state.diverged and self.state.curve[-1]["update"] != total:
            self._evaluate()
        self._save()
        if until is None:
            self.student.transformer.load_state_dict(self._best)
        return self.student.transformer.requires_grad_(requires_grad=False)

    def _update(self) -> None:
        data, asked = self._data, self._asked
        generator = torch.Generator().manual_seed(data.seed * 1_000_003 + self.state.update)
        runs = torch.randint(len(data.final) - data.held_out, (asked.batch,), generator=generator).numpy()
        t, r = draw_times(self._levels, asked.restrict, asked.batch, generator)
        noise = torch.randn((asked.batch, *data.final.shape[1:]), generator=generator)
        share = t.view(-1, *[1] * (noise.ndim - 1))
        x = (1 - share) * torch.from_numpy(data.final[runs]) + share * noise
        conditions = {name: value[runs] for name, value in data.conditions.items()}
        velocity = data.evaluator.evaluate(x.numpy(), (self._scale * t).numpy(), conditions)[0]
        own = self._own(conditions)
        x, t, r, v = (one.to(self._device) for one in (x, t, r, torch.from_numpy(velocity)))
        loss = meanflow_loss(partial(self.student.average, conditions=own), x, t, r, v, asked.derivative)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        norm = torch.stack([one.norm() for one in gradients if one is not None]).norm()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._diverge(f"the loss is {loss.item():g} at update {self.state.update}, its gradient {norm.item():g}")
            return
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient * (CLIP / norm.clamp(min=CLIP))
        self._optimizer.param_groups[0]["lr"] = asked.rate * self._share_of_rate()
        self._optimizer.step()
        self._optimizer.zero_grad()
        kept = min(AVERAGE, (self.state.update + 1) / (self.state.update + 10))
        for mean, parameter in zip(self._mean, self._parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - kept)
        self.state.update += 1

    def _share_of_rate(self) -> float:
        """Of the next update: from nothing up to one, and down to nothing at the last update."""
        done, total = self.state.update, self._asked.updates
        return min(1.0, (done + 1) / WARM_UP, (total - done) / (FALL * total))

    def _own(self, conditions: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Those of the one branch that the student has."""
        return {name: torch.from_numpy(conditions[name]).to(self._device) for name in self._data.model.io.conditions}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the student has the averages for weights."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        _set(self._parameters, self._mean)
        try:
            yield
        finally:
            _set(self._parameters, own)

    def _evaluate(self) -> None:
        with self._averaged():
            self._look()

    def _look(self) -> None:
        """The distance of the student's held-out runs from the teacher's, relative; the best weights are kept."""
        data, state = self._data, self.state
        rows = np.arange(len(data.final) - data.held_out, len(data.final))[:HELD_OUT]
        off = whole = 0.0
        for row in rows:  # one by one: as little memory as a sample takes
            own = self._own({name: value[[row]] for name, value in data.conditions.items()})
            noise, final = (torch.from_numpy(value[[row]]).to(self._device) for value in (data.noise, data.final))
            off += (self.student.sample(noise, data.few, own) - final).square().sum().item()
            whole += final.square().sum().item()
        error = (off / whole) ** 0.5
        state.curve.append({"update": state.update, "held_out": error})
        if error < state.best:
            state.best, state.best_update, self._best = error, state.update, self._weights()
        elif not error <= EXPLODED * state.best:
            self._diverge(f"held-out runs are off by {error:.3g} at update {state.update}, and were by {state.best:.3g}")

    def _diverge(self, why: str) -> None:
        self.state.diverged = why
        log.warning(
            "the distillation diverged: %s. The weights of update %d are kept, the best ones; a smaller --rate or --restrict "
            "may go further", why, self.state.best_update,
        )  # fmt: skip

    def _weights(self) -> dict[str, torch.Tensor]:
        """A copy, on the host."""
        return {name: value.detach().cpu().clone() for name, value in self.student.transformer.state_dict().items()}

    def _save(self) -> None:
        student, optimizer = self.student.transformer.state_dict(), self._optimizer.state_dict()
        write_checkpoint(self._path, self.state, student=student, best=self._best, optimizer=optimizer, mean=self._mean)
        self._saved = time.perf_counter()

    def _load(self) -> None:
        state, content = read_checkpoint(self._path, "cpu")
        self.state = DistillationState(**state)
        self.student.transformer.load_state_dict(content["student"])
        self._best = content["best"]
        self._mean = [value.to(self._device) for value in content["mean"]]
        self._optimizer.load_state_dict(content["optimizer"])
        log.info("going on from %s: %d updates done", self._path, self.state.update)


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
