"""The graph of a method that forecasts by a function of past features.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``T`` steps, ``W`` window.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods.parameters import Parameters
from cachec.passes.fold_predictor import BindingTimes, analyse, fold_predictor
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.methods.base import PredictorMethod


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


def fold_rows(
    method: "PredictorMethod", parameters: Parameters | None, histories: Mapping[int, tuple[int, ...]], sigmas: Array
) -> tuple[Array, Array]:
    """Weights [T, W] and bias [T] of a method's predictor, folded at some steps.

    ``histories``: step to which steps it looks at, newest first; ``sigmas`` [T + 1].

    Raises:
        PredictorError: it cannot be folded.
    """
    levels = torch.as_tensor(np.asarray(sigmas)).float()
    rows = fold_predictor(_captured(method, parameters, len(sigmas) - 1), levels, histories)
    return rows.coefficients.numpy(), rows.bias.numpy()


@functools.lru_cache(maxsize=16)
def _captured(method: "PredictorMethod", parameters: Parameters | None, num_steps: int) -> BindingTimes:
    """The predictor as a graph of small features: searches ask for thousands of its rows."""
    predictor = method.predictor(parameters).float().cpu()
    return analyse(capture_predictor(predictor, method.window, torch.zeros(2, 4, 3), num_steps))
