"""Plain solvers with as many model evaluations as a bundle: what caching has to beat.

Shapes: latents [B, …]; ``K`` evaluations.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from cachec.runtime.engine import VELOCITY, ExecutionContext
from cachec.runtime.session import ModelIO
from cachec.runtime.specs import Array

Denoise = Callable[[Mapping[str, Array], Array], Array]


def euler(context: ExecutionContext, io: ModelIO, sigmas: Array, timesteps: Array) -> Denoise:
    """Euler on ``sigmas`` [K + 1], the model's own sampler."""

    def denoise(conditions: Mapping[str, Array], noise: Array) -> Array:
        x, velocity = noise.copy(), np.empty_like(noise)
        for step, timestep in enumerate(timesteps):
            _evaluate(context, io, conditions, x, float(timestep), velocity)
            x += (sigmas[step + 1] - sigmas[step]) * velocity
        return x

    return denoise


def unipc(context: ExecutionContext, io: ModelIO, flow_shift: float, num_steps: int) -> Denoise:
    """UniPC (arXiv 2302.04867) as diffusers has it, for flows, at its default order 2."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)

    def denoise(conditions: Mapping[str, Array], noise: Array) -> Array:
        scheduler.set_timesteps(num_steps)  # also forgets the last run
        x, velocity = noise.copy(), np.empty_like(noise)
        for index, timestep in enumerate(scheduler.timesteps):
            # The scheduler rounds its timesteps to whole numbers; the model is told the exact noise level.
            _evaluate(context, io, conditions, x, float(scheduler.sigmas[index]), velocity)
            x = scheduler.step(torch.from_numpy(velocity), timestep, torch.from_numpy(x), return_dict=False)[0].numpy()
        return x

    return denoise


def _evaluate(
    context: ExecutionContext, io: ModelIO, conditions: Mapping[str, Array], x: Array, timestep: float, velocity: Array
) -> None:
    inputs = {io.latents: x, io.timestep: np.full(len(x), timestep, np.float32), **conditions}
    context.run(inputs, {VELOCITY: velocity})
