"""The student: the teacher's transformer, told a second time, as a function of noise levels.

``B`` samples; latents [B, …]; noise levels [B].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from cachec.compiler.graphs.capture import joined
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.flow_maps import make_flow_map
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.abi import TARGET_TIMESTEP
from cachec.runtime.errors import InputError

UNEVEN = 1e-3  # by which told times may differ from a multiple of the noise level: schedulers round


def told_per_level(name: str, sampling: Sampling) -> float:
    """What the model is told at the noise level 1: flows are told a multiple of it.

    Raises:
        InputError: the model, called ``name``, is no flow, or its sampler takes other steps than Euler's.
    """
    levels = np.asarray(sampling.sigmas[:-1], np.float64)
    scale = float(sampling.timesteps[0] / levels[0])
    if sampling.rows is not None or not np.allclose(sampling.timesteps, scale * levels, rtol=UNEVEN, atol=UNEVEN * scale):
        raise InputError(
            f"{name} is no model of flow matching as its sampler has it ({sampling.name}): MeanFlow is about flows. "
            "Take one that is sampled by FlowMatchEulerDiscreteScheduler"
        )
    return scale


class Student:
    """Average velocities of the ``transformer`` in training, in float32 on ``device``."""

    def __init__(self, model: LoadedModel, settings: Settings, sampling: Sampling, device: str) -> None:
        self._io, self._scale = model.io, told_per_level(model.spec.name, sampling)
        self._device = torch.device(device)
        self.transformer: nn.Module = make_flow_map(model.transformer).to(self._device)
        self._module = model.capturable(self.transformer)
        constants = model.constants(settings).items()
        self._constants = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in constants}

    def average(
        self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The average velocity from ``t`` down to ``r``."""
        io = self._io
        told = {io.timestep: self._scale * t, TARGET_TIMESTEP: self._scale * r}
        made: Any = self._module(**joined({io.latents: x, **told, **conditions}, io), **self._constants)
        velocity: torch.Tensor = made[0] if isinstance(made, tuple) else made
        begin, end = io.output or (0, x.shape[io.axis])
        return velocity.narrow(io.axis, begin, end - begin)

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, sampling: Sampling, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Latents at the end, by the steps of ``sampling``."""
        x, levels = noise, torch.from_numpy(np.asarray(sampling.sigmas, np.float32)).to(noise)
        for t, r in zip(levels[:-1], levels[1:], strict=True):
            x = x + (r - t) * self.average(x, t.expand(len(x)), r.expand(len(x)), conditions)
        return x
