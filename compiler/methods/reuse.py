"""Reuse the last computed feature.

Citation:
    Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration", arXiv 2407.01425, 2024
    (there per attention and MLP output; here on the one feature at the cut).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from cachec.compiler.methods.base import PredictorMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.predictor import Predictor


class _Reuse(Predictor):
    def forward(
        self, features: Sequence[torch.Tensor], history_steps: torch.Tensor, sigmas: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        return features[0] * 1.0


@dataclass(frozen=True)
class Reuse(PredictorMethod):
    """Order 0, no warm-up of its own, one slot. Exact on constant features; lags behind everything that moves."""

    name: ClassVar[str] = "reuse"
    summary: ClassVar[str] = "repeat the last computed feature (FORA)"
    default_interval: ClassVar[int] = 3

    @property
    def window(self) -> int:
        return 1

    def predictor(self, parameters: Parameters | None) -> Predictor:
        return _Reuse()
