"""What a method is: a predictor of the feature at the cut, and the facts that compiling it needs.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``T`` steps, ``W`` window.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from cachec.compiler.calibration.trajectories import Denoiser, Trajectories
from cachec.compiler.schedule import Schedule, interval_schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class Parameters:
    """Trained parameters of a method: named tensors, and the facts of their training.

    ``origin`` says where they come from, for messages.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, str]
    origin: str


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


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a method is trained on: the split model, recorded runs, and runs that only tell when to stop."""

    denoiser: Denoiser
    train: Trajectories
    held_out: Trajectories
    schedule: Schedule
    seed: int
    work: Path


@dataclass(frozen=True)
class Method(ABC):
    """A published way to forecast; its fields are its options (``--set name=value``).

    ``feeds_back``: the history holds every earlier step, forecasts included, and not only computed ones.
    ``needs_training``: :meth:`predictor` needs parameters from training.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    feeds_back: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    default_interval: ClassVar[int]
    extra_steps: ClassVar[tuple[int, ...]] = ()

    @property
    @abstractmethod
    def window(self) -> int:
        """How many past features a forecast looks at."""

    @abstractmethod
    def predictor(self, parameters: Parameters | None) -> Predictor:
        """The predictor graph."""

    def fit(self, data: TrainingData) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Train; returns the parameters and what is worth knowing about their training."""
        raise PredictorError(f"method {self.name!r} has nothing to train; compile it as it is")

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The method's own published schedule."""
        return interval_schedule(num_steps, interval, extra=self.extra_steps)

    @classmethod
    def with_options(cls, options: Mapping[str, str]) -> Self:
        """Make the method from ``--set`` options.

        Raises:
            InputError: an option is unknown, or its value is not a whole number in range.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in fields:
                if not fields:
                    raise InputError(f"method {cls.name!r} has no options, so {key}={text} cannot be set")
                raise unknown_name(f"option of method {cls.name!r}", key, fields)
            try:
                values[key] = int(text)
            except ValueError as error:
                raise InputError(f"option {key} is {text!r}; it must be a whole number") from error
        return cls(**values)

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class ForecastTable:
    """A whole schedule as numbers: the forecast of step s is ``sum_a coefficients[s, a] F_a + bias[s]``.

    ``coefficients`` [T, K] over the K computed features in order, ``bias`` [T]; float64. Rows of computed steps are zero.
    """

    schedule: Schedule
    coefficients: Array
    bias: Array


def compose(rows: Array, bias: Array, schedule: Schedule, *, feeds_back: bool) -> ForecastTable:
    """Write every forecast in terms of computed features only (affine maps compose).

    ``rows`` [T, W] and ``bias`` [T] are over each step's history, newest first. Float64 throughout.
    """
    num_steps, window = rows.shape
    index = {step: column for column, step in enumerate(schedule.compute)}
    full = np.zeros((num_steps, len(index)))  # every step's feature in terms of the computed ones
    offset = np.zeros(num_steps)
    for step in range(num_steps):
        if step in index:
            full[step, index[step]] = 1.0
            continue
        history = list(schedule.history(step, window, feeds_back=feeds_back))
        full[step] = rows[step] @ full[history]
        offset[step] = rows[step] @ offset[history] + bias[step]
    computed = list(schedule.compute)
    full[computed], offset[computed] = 0.0, 0.0
    return ForecastTable(schedule, full, offset)
