"""Training of LESA's predictor (arXiv 2602.20497, section "two-stage training").

Phase 1, teacher-forced: the history is the true one. Phase 2, closed loop: the model runs at computed steps, the
predictor's own forecasts are its history and steer the latents. L1 against the uncached feature, one update per forecast.

Differs from the released code, on purpose: float32 instead of bfloat16, and instead of a step decay that has shrunk the
learning rate to nothing when phase 2 begins, each phase starts anew, from the best weights so far, and ends when held-out
closed loops stop improving: teacher-forced errors go on falling long after these have begun to rise.
"""

import json
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from tqdm import tqdm

from cachec.compiler.calibration.checkpoints import read_checkpoint, write_checkpoint
from cachec.compiler.calibration.runs import Trajectories
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.lesa import STAGE_BOUNDS, WINDOWS, LesaBranches, LesaPredictor
from cachec.runtime.abi import GUIDANCE
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)

BATCH = 16  # prompts an update
RATES = (1e-3, 3e-4)  # learning rate at the start of each phase
DROP = 0.3  # factor on the rate at a plateau
MAX_DROPS = (0, 2)  # plateaus that a phase goes on after, at a lower rate
PATIENCE = (6, 6)  # rounds without improvement that make a plateau
MAX_ROUNDS = (60, 80)  # after which a phase ends in any case


@dataclass
class TrainingState:
    """Where a training stands; everything that a checkpoint holds but the tensors. ``curve`` is for plots."""

    phase: int = 0
    round: int = 0
    updates: int = 0
    drops: int = 0
    stale: int = 0
    best: float = float("inf")
    phase_best: float = float("inf")
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class LesaTrainer:
    """Trains a predictor on recorded trajectories; resumes from ``work`` if a checkpoint lies there.

    ``bounds``: of the experts. ``apart``: where there are two branches of guidance, each gets a predictor.
    """

    def __init__(
        self, data: TrainingData, *, max_rounds: int, bounds: tuple[float, float] = STAGE_BOUNDS, apart: bool = False
    ) -> None:
        torch.manual_seed(data.seed)
        self._device = data.evaluator.device
        self._num_negative = _negative_tokens(data) if apart and GUIDANCE in data.train.conditions else None
        kind = LesaPredictor if self._num_negative is None else LesaBranches
        self.predictor = kind(data.schedule.num_steps, bounds).to(self._device)
        self.state = TrainingState()
        self._best = self._weights()
        self._evaluator, self._sampling = data.evaluator, data.sampling
        self._sigmas = self._there(data.sampling.sigmas)
        self._train, self._held_out = data.train, data.held_out
        self._schedule, self._seed, self._max_rounds = data.schedule, data.seed, max_rounds
        self._path = data.work / "lesa.checkpoint"
        self._optimizer = self._new_optimizer()
        if self._path.exists():
            self._load()

    def run(self) -> dict[str, Array]:
        """Both phases. Returns the best weights."""
        if not self.state.curve:
            self._evaluate()  # the untrained predictor, which is nearly plain reuse
        with tqdm(desc="training lesa", unit="round", initial=self.state.round) as bar:
            while self.state.phase < 2:
                start = time.perf_counter()
                self._round()
                self.state.seconds += time.perf_counter() - start
                bar.update()
                bar.set_postfix_str(self._summary())
                self._save()
        return {name: weights.cpu().numpy() for name, weights in self._best.items()}

    def facts(self) -> dict[str, str]:
        """How the training went, for the predictor file."""
        state = self.state
        values = {
            "updates": state.updates,
            "training_seconds": round(state.seconds),
            "best_held_out_latent_rel_l2": state.best,
            "optimizer": f"AdamW, rates {RATES}, times {DROP} at a plateau, {MAX_DROPS} times in the two phases",
            "batch": BATCH,
            "num_held_out": len(self._held_out.noise),
            "curve": json.dumps(state.curve),
        }
        return {name: str(value) for name, value in values.items()}

    def _round(self) -> None:
        state = self.state
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + state.phase * 10_007 + state.round)
        order = torch.randperm(len(self._train.noise), generator=generator)
        batches = torch.split(order if state.phase == 0 else order[:BATCH], BATCH)
        for index in batches:
            batch = self._train.select(index.numpy())
            if state.phase == 0:
                self._teacher_forced(batch, generator)
            else:
                self._closed_loop(batch, learn=True)
        state.round += 1
        self._evaluate()
        if self._react() or state.round >= min(MAX_ROUNDS[state.phase], self._max_rounds):
            self._next_phase()

    def _teacher_forced(self, batch: Trajectories, generator: torch.Generator) -> None:
        steps = self._schedule.forecast
        for position in torch.randperm(len(steps), generator=generator).tolist():
            self._update(self._teacher_loss(batch, steps[position]))

    def _teacher_loss(self, batch: Trajectories, step: int) -> torch.Tensor:
        history = self._schedule.history(step, max(WINDOWS), feeds_back=True)
        true = self._there(batch.features)
        return (self._predict([true[:, past].float() for past in history], step) - true[:, step].float()).abs().mean()

    def _closed_loop(self, batch: Trajectories, *, learn: bool) -> Array:
        """One run of the cached model on ``batch``; with ``learn``, an update at each forecast. Returns the latents."""
        x, true = batch.noise, self._there(batch.features)
        history: deque[torch.Tensor] = deque(maxlen=max(WINDOWS))
        computed = set(self._schedule.compute)
        for step in range(self._schedule.num_steps):
            told = self._sampling.timesteps[step]
            conditions = {**batch.conditions, **self._sampling.told_besides(step, len(x))}
            if step in computed:
                velocity, computed_feature = self._evaluator.evaluate(x, told, conditions)
                feature = self._there(computed_feature)
            else:
                features = list(history) + [history[-1]] * (max(WINDOWS) - len(history))
                with torch.set_grad_enabled(learn):
                    feature = self._predict(features, step)
                    if learn:
                        seen = feature if len(batch.tokens) == feature.shape[1] else feature[:, batch.tokens]
                        self._update((seen - true[:, step].float()).abs().mean())
                feature = feature.detach()
                velocity = self._evaluator.tail(feature.cpu().numpy(), told, conditions)
            history.appendleft(feature)
            x = x + (self._sigmas[step + 1] - self._sigmas[step]).item() * velocity
        return x

    def _predict(self, features: list[torch.Tensor], step: int) -> torch.Tensor:
        steps = torch.zeros(len(features), dtype=torch.int64)
        numbers = steps.to(self._device), self._sigmas, torch.tensor(step).to(self._device)
        if self._num_negative is None:
            return cast("torch.Tensor", self.predictor(features, *numbers))
        num_tokens, num_kept = features[0].shape[1], len(self._train.tokens)
        negative = self._num_negative if num_tokens == num_kept else num_tokens // 2
        return cast("torch.Tensor", self.predictor(features, *numbers, negative))

    def _there(self, values: Array) -> torch.Tensor:
        tensor = torch.from_numpy(values).to(self._device)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor  # whose bits they are

    def _update(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        self._optimizer.step()
        self.state.updates += 1

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Held-out error, teacher-forced and closed loop, added to the curve; keeps the best weights."""
        state, held_out = self.state, self._held_out
        loss = torch.stack([self._teacher_loss(held_out, step) for step in self._schedule.forecast]).mean().item()
        error = self._closed_loop(held_out, learn=False) - held_out.final
        relative = float(np.linalg.norm(error) / np.linalg.norm(held_out.final))
        state.curve.append(
            {"updates": state.updates, "phase": state.phase, "held_out_l1": loss, "held_out_latent_rel_l2": relative}
        )
        if relative < state.best:
            state.best = relative
            self._best = self._weights()

    def _react(self) -> bool:
        """Count rounds without improvement; lower the rate at a plateau. True when the phase is over."""
        state = self.state
        measure = state.curve[-1]["held_out_latent_rel_l2"]
        if measure < state.phase_best * (1 - 1e-3):
            state.phase_best, state.stale = measure, 0
            return False
        state.stale += 1
        if state.stale < PATIENCE[state.phase]:
            return False
        state.stale = 0
        state.drops += 1
        for group in self._optimizer.param_groups:
            group["lr"] *= DROP
        return state.drops > MAX_DROPS[state.phase]

    def _next_phase(self) -> None:
        state = self.state
        state.phase, state.round, state.drops, state.stale, state.phase_best = state.phase + 1, 0, 0, 0, float("inf")
        self.predictor.load_state_dict(self._best)
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        rate = RATES[min(self.state.phase, 1)]
        return torch.optim.AdamW(self.predictor.parameters(), lr=rate, weight_decay=1e-4)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.predictor.state_dict().items()}

    def _summary(self) -> str:
        error = self.state.curve[-1]["held_out_latent_rel_l2"]
        return f"phase {self.state.phase + 1}, held-out latents off by {error:.4f} (best {self.state.best:.4f})"

    def _save(self) -> None:
        predictor, optimizer = self.predictor.state_dict(), self._optimizer.state_dict()
        write_checkpoint(self._path, self.state, predictor=predictor, best=self._best, optimizer=optimizer)

    def _load(self) -> None:
        state, content = read_checkpoint(self._path, self._device)
        self.state = TrainingState(**state)
        self.predictor.load_state_dict(content["predictor"])
        self._best = content["best"]
        self._optimizer = self._new_optimizer()
        self._optimizer.load_state_dict(content["optimizer"])
        log.info("going on from %s: %d updates done", self._path, self.state.updates)


def _negative_tokens(data: TrainingData) -> int:
    """How many of the tokens whose features are kept are of the negative branch, which come first."""
    first = data.train.select(np.arange(1))
    conditions = {**first.conditions, **data.sampling.told_besides(0, 1)}
    _, feature = data.evaluator.evaluate(first.noise, data.sampling.timesteps[0], conditions)
    return int((data.train.tokens < feature.shape[1] // 2).sum())
