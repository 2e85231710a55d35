"""Runs of the uncached model, recorded: what predictors are trained on.

Shapes: ``P`` prompts, ``T`` steps, ``L`` tokens, ``D`` channels of the feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from cachec.compiler.models.base import LoadedModel, Settings, tensors_from
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable, Table
from cachec.passes import Graphs
from cachec.passes.base import placeholders
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, VELOCITY
from cachec.runtime.files import write_file
from cachec.runtime.noise import NUM_SEEDS, make_noise

CHUNK = 16  # prompts a batch
TRAINING_SEED_BASE = NUM_SEEDS  # training noise has seeds from here on; people's seeds are smaller


@dataclass(frozen=True, eq=False)
class Trajectories:
    """``noise`` and ``final`` latents [P, …], ``features`` [P, T, L, D] at the cut, ``conditions`` by name [P, …]."""

    noise: torch.Tensor
    final: torch.Tensor
    features: torch.Tensor
    conditions: Mapping[str, torch.Tensor]

    def select(self, index: torch.Tensor) -> "Trajectories":
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return Trajectories(self.noise[index], self.final[index], self.features[index], conditions)


class Denoiser:
    """The split model on PyTorch, step by step, for training and calibration."""

    def __init__(self, model: LoadedModel, split: Graphs, settings: Settings) -> None:
        sigmas, timesteps = model.sampling(settings)
        self.sigmas, self.timesteps = torch.from_numpy(sigmas), torch.from_numpy(timesteps)
        self._io = model.io
        self._compute, self._forecast = split.modules[COMPUTE], split.modules[FORECAST]
        self._tail_inputs = set(placeholders(self._forecast))

    @torch.no_grad()
    def compute(self, x: torch.Tensor, step: int, conditions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity and feature of the whole model at ``step``."""
        result = self._compute(**{self._io.latents: x, self._io.timestep: self._time(x, step), **conditions})
        return result[VELOCITY], result[FEATURE]

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, timestep: float, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Velocity of the whole model, told any ``timestep``."""
        return self.differentiable_velocity(x, torch.tensor(timestep, dtype=x.dtype), conditions)

    def differentiable_velocity(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The same with gradients, for latents and the scalar ``timestep``."""
        inputs = {self._io.latents: x, self._io.timestep: timestep.expand(len(x)), **conditions}
        velocity: torch.Tensor = self._compute(**inputs)[VELOCITY]
        return velocity

    @torch.no_grad()
    def tail(self, feature: torch.Tensor, step: int, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Velocity from a feature."""
        known = {**conditions, self._io.timestep: self._time(feature, step), FEATURE: feature}
        velocity: torch.Tensor = self._forecast(**{n: v for n, v in known.items() if n in self._tail_inputs})[VELOCITY]
        return velocity

    def advance(self, x: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """Euler step of the flow."""
        return x + (self.sigmas[step + 1] - self.sigmas[step]) * velocity

    def play(self, table: Table, noise: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Final latents of the closed loop: the model at computed steps, the table elsewhere."""
        if isinstance(table, AdvanceTable):
            return self._advance_by(table, noise, conditions)
        return self._forecast_by(table, noise, conditions)

    def _advance_by(self, table: AdvanceTable, noise: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        timesteps = self.timesteps[list(table.schedule.compute)] if table.timesteps is None else table.timesteps
        rows = torch.from_numpy(table.coefficients).to(noise.dtype)
        x, velocities = noise, noise.new_empty((len(rows), *noise.shape))
        for i, timestep in enumerate(timesteps):
            velocities[i] = self.velocity(x, float(timestep), conditions)
            x = noise + torch.tensordot(rows[i, : i + 1], velocities[: i + 1], 1)
        return x

    def _forecast_by(self, table: ForecastTable, noise: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        x, features, computed = noise, [], set(table.schedule.compute)
        for step in range(table.schedule.num_steps):
            if step in computed:
                velocity, feature = self.compute(x, step, conditions)
                features.append(feature)
            else:
                row = torch.from_numpy(table.coefficients[step, : len(features)]).to(x.dtype)
                forecast = sum(weight * past for weight, past in zip(row, features, strict=True)) + float(table.bias[step])
                velocity = self.tail(torch.as_tensor(forecast), step, conditions)
            x = self.advance(x, velocity, step)
        return x

    def _time(self, x: torch.Tensor, step: int) -> torch.Tensor:
        return self.timesteps[step].expand(len(x)).clone()


def record_trajectories(
    model: LoadedModel, denoiser: Denoiser, settings: Settings, prompts: Sequence[str], *, seed: int, work: Path
) -> Trajectories:
    """Run the uncached model once per prompt. Chunks are kept in ``work``, and not made again after an interruption."""
    chunks = []
    starts = range(0, len(prompts), CHUNK)
    for start in tqdm(starts, desc=f"uncached runs of {len(prompts)} prompts", unit="batch"):
        path = work / f"trajectories-{start:04d}.safetensors"
        if not path.exists():
            write_file(path, save(_record(model, denoiser, settings, prompts[start : start + CHUNK], seed, start)))
        chunks.append(load_file(path))
    joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    conditions = {name: joined[name] for name in model.io.conditions}
    return Trajectories(joined["noise"], joined["final"], joined["features"], conditions)


def _record(
    model: LoadedModel, denoiser: Denoiser, settings: Settings, prompts: Sequence[str], seed: int, start: int
) -> dict[str, torch.Tensor]:
    conditions = tensors_from(model.encode(prompts, settings, model.io.conditions))
    shape = tuple(model.example_inputs(settings)[model.io.latents].shape[1:])
    seeds = [TRAINING_SEED_BASE + (seed * 4096 + start + i) % NUM_SEEDS for i in range(len(prompts))]
    noise = torch.from_numpy(np.stack([make_noise(s, shape) for s in seeds]))
    x, features = noise, []
    for step in range(settings.steps):
        velocity, feature = denoiser.compute(x, step, conditions)
        features.append(feature)
        x = denoiser.advance(x, velocity, step)
    return {"noise": noise, "final": x, "features": torch.stack(features, dim=1), **conditions}
