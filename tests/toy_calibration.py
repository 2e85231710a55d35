"""A model of a few dozen weights with a real denoiser around it, in float64, and calibrations of it: for fits and searches.

``P`` prompts, ``L = 4`` tokens, ``D = 5`` channels.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import fx, nn

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.runs import Denoiser
from cachec.compiler.calibration.statistics import Statistics, gram
from cachec.passes import Graphs
from cachec.runtime.abi import COMPUTE, FORECAST
from cachec.runtime.model_io import ModelIO

TOKENS, CHANNELS = 4, 5
IO = ModelIO("latents", "timestep", ("prompt",))


class Tail(nn.Module):
    def __init__(self, curved: bool) -> None:
        super().__init__()
        self.curved = curved
        self.out = nn.Parameter(torch.randn(CHANNELS, CHANNELS, dtype=torch.float64) / CHANNELS**0.5)

    def velocity(self, feature: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return (torch.sin(feature) @ self.out) * (1 + 0.2 * prompt) + feature if self.curved else feature

    def forward(self, feature: torch.Tensor, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"velocity": self.velocity(feature, prompt)}


class Body(nn.Module):
    """Curved: velocities bend with latents, time and prompt. Otherwise they are the prompt, all the way."""

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.tail = tail
        self.mix = nn.Parameter(torch.randn(CHANNELS, CHANNELS, dtype=torch.float64) / CHANNELS**0.5)
        self.time = nn.Parameter(torch.randn(CHANNELS, dtype=torch.float64))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
        feature = prompt
        if self.tail.curved:
            feature = torch.tanh(0.5 * latents @ self.mix + torch.sin(2 * timestep[:, None, None] * self.time) + prompt)
        return {"velocity": self.tail.velocity(feature, prompt), "feature": feature}


def sigmas_of(num_steps, shift=2.0):
    t = np.linspace(1, 0, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def make_denoiser(num_steps, *, curved=True):
    torch.manual_seed(0)
    tail = Tail(curved)
    split = Graphs({COMPUTE: fx.symbolic_trace(Body(tail)), FORECAST: fx.symbolic_trace(tail)})
    sigmas = sigmas_of(num_steps)
    model = SimpleNamespace(io=IO, sampling=lambda settings: (sigmas, 0.9 * sigmas[:-1]))
    return Denoiser(model, split, None)


def record(denoiser, noise, prompt):
    """Velocities, features and the latents after each step of the uncached run, each [P, T, L, D]."""
    x, velocities, features, latents = noise, [], [], []
    for step in range(len(denoiser.sigmas) - 1):
        velocity, feature = denoiser.compute(x, step, {"prompt": prompt})
        x = denoiser.advance(x, velocity, step)
        velocities.append(velocity)
        features.append(feature)
        latents.append(x)
    return tuple(torch.stack(values, dim=1) for values in (velocities, features, latents))


def make_calibration(num_prompts=6, num_steps=12, *, curved=True, fine_steps=0, fine=False, seed=0):
    """A calibration on the toy; ``fine_steps`` of a fine reference, which is the target with ``fine``."""
    denoiser = make_denoiser(num_steps, curved=curved)
    generator = torch.Generator().manual_seed(100 + seed)
    noise, prompt = torch.randn(2, num_prompts, TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    velocities, features, latents = record(denoiser, noise, prompt)
    finer = make_denoiser(fine_steps, curved=curved) if fine_steps else None
    fine_velocities, _, fine_latents = record(finer, noise, prompt) if finer else (None, None, None)
    statistics = Statistics(
        noise=noise,
        latents=latents,
        velocity_gram=gram(velocities.unbind(1)),
        feature_gram=gram(features.unbind(1)),
        fine_latents=fine_latents,
        fine_velocity_gram=None if fine_velocities is None else gram(fine_velocities.unbind(1)),
        prompts=tuple(f"prompt {i}" for i in range(num_prompts)),
        facts={},
        origin="the toy's runs",
    )
    return Calibration(statistics, finer if fine else denoiser, {"prompt": prompt}, torch.arange(num_prompts), fine)


def raw_runs(calibration):
    """Velocities and features [P, T, E] of the uncached runs, flat, as numpy."""
    velocities, features, _ = record(calibration.denoiser, calibration.noise(), calibration.all_conditions()["prompt"])
    return velocities.flatten(2).numpy(), features.flatten(2).numpy()
