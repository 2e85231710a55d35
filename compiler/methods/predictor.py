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
from cachec.passes import BindingTimes, binding_times, fold_step
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.methods.base import PredictorMethod


class Predictor(nn.Module, ABC):
    """What is folded, or inlined: a function of past features and of the schedule, without state of its own."""

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
    levels = tuple(np.asarray(sigmas, np.float32).tolist())
    rows, bias = np.zeros((len(levels) - 1, method.window)), np.zeros(len(levels) - 1)
    for step, history in histories.items():
        rows[step], bias[step] = _folded_step(method, parameters, levels, step, history)
    return rows, bias


@functools.lru_cache(maxsize=2**16)  # a search asks for the same rows in thousands of schedules
def _folded_step(
    method: "PredictorMethod", parameters: Parameters | None, sigmas: tuple[float, ...], step: int, history: tuple[int, ...]
) -> tuple[Array, float]:
    row, bias = fold_step(_captured(method, parameters, len(sigmas) - 1), torch.tensor(sigmas), step, history)
    return row.numpy(), bias


@functools.lru_cache(maxsize=16)
def _captured(method: "PredictorMethod", parameters: Parameters | None, num_steps: int) -> BindingTimes:
    """The predictor as a graph of small features: searches ask for thousands of its rows."""
    predictor = method.predictor(parameters).float().cpu()
    return binding_times(capture_predictor(predictor, method.window, torch.zeros(2, 4, 3), num_steps))
