"""Restricted MeanFlow, the loss of DisCa's base (arXiv 2602.05449 §3; MeanFlow: arXiv 2505.13447).

Along a flow dx/dt = v(x, t), the average velocity from time t down to r is (t - r) u = the integral of v. Differentiated by t:
u = v - (t - r) du/dt, where du/dt = v · ∂u/∂x + ∂u/∂t along the flow. So a network is trained toward the right side, as it
makes it itself, its gradient stopped: ‖u - sg(v - (t - r) du/dt)‖². *Restricted*: t - r is within [0, R], R = 0.2, where
MeanFlow has R = 1: long intervals have large, noisy derivatives, and a sampler of eight steps never asks for them.

Here v is the teacher's velocity, guided where the teacher is (so guidance is distilled, too), not noise less data: it is what
that would be on average, without its variance. Each sample's error is divided by itself, its gradient stopped (MeanFlow's
adaptive weight with p = 1).

``B`` samples; latents [B, …]; times are noise levels, 1 the noise and 0 the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cachec.runtime.errors import InputError, in_one_line, unknown_name

AverageVelocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of latents, t and r [B]
Derivative = Literal["exact", "difference"]

INSTANTS = 0.25  # of the samples have r = t, where the loss is the teacher's velocity itself; in MeanFlow 0.75
WIDTH = 0.05  # of noise levels, for differences to either side
LEAST_ERROR = 1e-3  # what errors are divided by, at least: mean squares


@dataclass(frozen=True)
class Distilling:
    """What a distillation is asked for.

    ``steps`` that the student is to take; ``restrict``: R; ``updates`` of ``batch`` samples at the learning ``rate``;
    ``derivative``: du/dt by a difference over ``WIDTH``, or as forward-mode differentiation gives it.
    """

    steps: int = 8
    restrict: float = 0.2
    updates: int = 2000
    batch: int = 4
    rate: float = 1e-5
    derivative: str = "difference"

    def __post_init__(self) -> None:
        if not 0 < self.restrict <= 1:
            raise InputError(
                f"restrict is {self.restrict}; it must be above 0, and 1 at most: the longest interval of noise levels"
            )
        for name, least in (("steps", 1), ("updates", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.rate < 1:
            raise InputError(f"rate is {self.rate}; it must be above 0 and below 1")
        if self.derivative not in ("exact", "difference"):
            raise unknown_name("derivative", self.derivative, ("exact", "difference"))


def shaped(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number a sample, [B, 1, …] as ``like`` [B, …] has axes."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def draw_times(
    levels: torch.Tensor, restrict: float, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where intervals begin and end, t and r [B]: t as the teacher's own ``levels`` [T + 1] are spread, t - r in [0, R] evenly.

    No interval goes past the end.
    """
    place = torch.rand(batch, generator=generator) * (len(levels) - 1)
    below = place.long().clamp(max=len(levels) - 2)
    t = torch.lerp(levels[below], levels[below + 1], place - below)
    length = restrict * torch.rand(batch, generator=generator)
    instant = torch.rand(batch, generator=generator) < INSTANTS
    return t, torch.where(instant, t, (t - length).clamp(min=0))


@torch.no_grad()
def derivative_along(
    average: AverageVelocity, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, v: torch.Tensor, how: str, width: float = WIDTH
) -> torch.Tensor:
    """du/dt along the flow, [B, …]: the Jacobian-vector product of ``average`` with (v, 1, 0).

    Models are told times as sinusoids, the fastest of which turn once in 0.006 of noise level. Values barely depend on these,
    and no training has smoothed their slopes: a difference of ``width`` to either side, within the flow, sees past them.

    Raises:
        InputError: an operator of the model has no rule for forward-mode differentiation.
    """
    if how == "difference":
        above, below = (t + width).clamp(max=1), (t - width).clamp(min=0)
        ends = [average(x + shaped(time - t, x) * v, time, r) for time in (above, below)]
        return (ends[0] - ends[1]) / shaped(above - below, x)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no rule
            derivative: torch.Tensor = torch.func.jvp(average, (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))[1]
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "functorch")):
            raise
        raise InputError(
            f"the model cannot be differentiated forwards ({in_one_line(error)}): take --derivative difference"
        ) from error
    return derivative


def meanflow_loss(
    average: AverageVelocity, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, v: torch.Tensor, how: str = "difference"
) -> torch.Tensor:
    """The loss at latents ``x``, whose velocity is ``v``; a scalar, differentiable in what ``average`` is made of."""
    target = v - shaped(t - r, x) * derivative_along(average, x, t, r, v, how)
    error = (average(x, t, r) - target).square().flatten(1).mean(1)
    return (error / (error.detach() + LEAST_ERROR)).mean()
