"""Extrapolate by finite differences.

Citation:
    Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv 2503.06923,
    ICCV 2025; the recursion is that of the released code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from cachec.compiler.methods.base import PredictorMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.predictor import Predictor
from cachec.runtime.errors import InputError

WARMUP = 3  # "first_enhance": differences are taken from the last of these steps on


class _Taylor(Predictor):
    """Differences by the published recursion, unrolled over the window.

    At a computed step a_j with distance d_j = a_j - a_{j-1}: D_0 = F, D_{i+1}(j) = (D_i(j) - D_i(j-1)) / d_j, where an order
    exists only if it existed one computed step earlier and a_j > WARMUP - 2. Forecast: sum_i D_i k^i / i!, k = step - a_0.
    """

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(
        self, features: Sequence[torch.Tensor], history_steps: torch.Tensor, sigmas: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        differences = list(features)  # D_i at each computed step of the window, newest first
        exists = torch.ones_like(history_steps, dtype=torch.float32)
        distance = (step - history_steps[0]).to(torch.float32)
        forecast = features[0]
        gaps = (history_steps[:-1] - history_steps[1:]).to(torch.float32)  # 0 where the window repeats its oldest
        usable = ((history_steps[:-1] > WARMUP - 2) & (gaps > 0)).to(torch.float32)
        for order in range(1, self.order + 1):
            left = self.order + 1 - order
            exists = exists[:-1] * exists[1:] * usable[:left]
            scale = exists / gaps[:left].clamp(min=1.0)
            differences = [(differences[j] - differences[j + 1]) * scale[j] for j in range(left)]
            forecast = forecast + differences[0] * (distance**order / math.factorial(order))
        return forecast


@dataclass(frozen=True)
class Taylor(PredictorMethod):
    """Order ``order``, warm-up 3 steps, ``order + 1`` slots.

    Exact on features that are linear in the step. Second and higher differences are plain, not divided: the curvature is
    underweighted, which damps; large intervals at order 2 amplify errors (sum of weights 4 at N = 6).
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "extrapolate by finite differences (TaylorSeer)"
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = WARMUP
    order: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 8:
            raise InputError(f"order is {self.order}; taylor takes 0 to 8")

    @property
    def window(self) -> int:
        return self.order + 1

    def predictor(self, parameters: Parameters | None) -> Predictor:
        return _Taylor(self.order)
