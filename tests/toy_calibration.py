"""A model of a few dozen weights with real graphs around it, in float64, and calibrations of it: for fits and searches.

``P`` prompts, ``L = 4`` tokens, ``D = 5`` channels.
"""

import numpy as np
import torch
from torch import fx, nn

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import run_uncached
from cachec.compiler.calibration.statistics import Statistics, gram
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.tables.sampling import Sampling
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


def make_evaluator(*, curved=True):
    torch.manual_seed(0)
    tail = Tail(curved)
    return GraphEvaluator(Graphs({COMPUTE: fx.symbolic_trace(Body(tail)), FORECAST: fx.symbolic_trace(tail)}), IO)


def sampling_of(num_steps):
    """As real samplers have it: float32."""
    sigmas = sigmas_of(num_steps).astype(np.float32)
    return Sampling(sigmas, np.float32(0.9) * sigmas[:-1])


def record(evaluator, sampling, noise, prompt):
    """Velocities, features and the latents after each step of the uncached run, each [P, T, L, D]."""
    steps = list(run_uncached(evaluator, sampling, noise, {"prompt": prompt}))
    return tuple(np.stack([getattr(step, name) for step in steps], axis=1) for name in ("velocity", "feature", "latents"))


def grams(values):
    return gram(list(values.swapaxes(0, 1)))


def make_calibration(num_prompts=6, num_steps=12, *, curved=True, fine_steps=0, fine=False, seed=0, uses=None):
    """A calibration on the toy; ``fine_steps`` of a fine reference, which is the target with ``fine``.

    ``uses``: what each prompt is for; by default every fourth is to stop by.
    """
    evaluator, sampling = make_evaluator(curved=curved), sampling_of(num_steps)
    generator = torch.Generator().manual_seed(100 + seed)
    noise, prompt = torch.randn(2, num_prompts, TOKENS, CHANNELS, generator=generator, dtype=torch.float64).numpy()
    velocities, features, latents = record(evaluator, sampling, noise, prompt)
    finer = sampling_of(fine_steps) if fine_steps else None
    fine_velocities, _, fine_latents = record(evaluator, finer, noise, prompt) if finer else (None, None, None)
    uses = uses or ["stop" if i % 4 == 3 else "fit" for i in range(num_prompts)]
    whole = num_prompts - uses.count("choose")
    statistics = Statistics(
        noise=noise,
        latents=latents[:whole],
        velocity_gram=grams(velocities[:whole]),
        feature_gram=grams(features[:whole]),
        fine_latents=None if fine_latents is None else fine_latents[:whole],
        fine_velocity_gram=None if fine_velocities is None else grams(fine_velocities[:whole]),
        prompts=UsedPrompts(tuple(f"prompt {i}" for i in range(num_prompts)), tuple(uses)),
        facts={},
        origin="the toy's runs",
        final=latents[whole:, -1] if whole < num_prompts else None,
        fine_final=None if fine_latents is None or whole == num_prompts else fine_latents[whole:, -1],
    )
    return Calibration(statistics, evaluator, finer if fine else sampling, {"prompt": prompt}, np.arange(num_prompts), fine)


def raw_runs(calibration):
    """Velocities and features [P, T, E] of the uncached runs, flat."""
    prompt = calibration.all_conditions()["prompt"]
    velocities, features, _ = record(calibration.evaluator, calibration.sampling, calibration.noise(), prompt)
    return tuple(values.reshape(*values.shape[:2], -1) for values in (velocities, features))
