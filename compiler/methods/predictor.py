"""The graph of a method that forecasts by a function of past features.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``T`` steps, ``W`` window.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from cachec.runtime.specs import Array


class Predictor(nn.Module, ABC):
    """The graph that is inlined: a function of past features and of the schedule, without state of its own."""

    @abstractmethod
    def forward(
        self, features: Sequence[torch.Tensor], history_steps: torch.Tensor, sigmas: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        """Forecast the feature of ``step``.

        ``features`` W tensors [B, L, D], newest first, of steps ``history_steps`` [W]; ``sigmas`` [T + 1] noise levels;
        ``step`` scalar. Returns [B, L, D].
        """


@torch.no_grad()
def probe_rows(predictor: Predictor, histories: Mapping[int, tuple[int, ...]], sigmas: Array) -> tuple[Array, Array]:
    """Weights [T, W] and bias [T] of an affine, elementwise predictor at some steps: its values at zero and unit features.

    ``histories``: step to which steps it looks at, newest first; ``sigmas`` [T + 1].
    """
    levels = torch.as_tensor(np.asarray(sigmas)).float()
    window = len(next(iter(histories.values()), ()))
    rows, bias = np.zeros((len(sigmas) - 1, window)), np.zeros(len(sigmas) - 1)
    basis = torch.cat([torch.zeros(window, 1), torch.eye(window)], dim=1).float()  # feature j is 1 in column j + 1
    features = [row[None, None] for row in basis]
    for step, history in histories.items():
        values = predictor(features, torch.tensor(history), levels, torch.tensor(step))[0, 0].double().numpy()
        rows[step], bias[step] = values[1:] - values[0], values[0]
    return rows, bias
