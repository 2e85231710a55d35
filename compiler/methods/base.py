"""What a method is: a way to forecast at a cut, and the facts that compiling it needs.

Two kinds of method. A :class:`PredictorMethod` is a graph of past features, inlined into the forecast graph and folded to
numbers by the passes. A :class:`TableMethod` states its numbers directly. Either way the result is a table:
a ``ForecastTable`` on the hidden cut, an ``AdvanceTable`` on the output cut (``compiler/table.py``).

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``T`` steps, ``K`` computed steps, ``W`` window, ``P`` prompts.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from cachec.compiler.tables.coefficients import ForecastTable, Table, compose
from cachec.compiler.tables.schedule import Schedule, interval_for_budget, interval_schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.calibration.calibration import Calibration
    from cachec.compiler.calibration.runs import Denoiser, Trajectories


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

    denoiser: "Denoiser"
    train: "Trajectories"
    held_out: "Trajectories"
    schedule: Schedule
    seed: int
    work: Path


@dataclass(frozen=True)
class Method(ABC):
    """A way to forecast; its fields are its options (``--set name=value``).

    ``needs_training``: wants parameters from ``cachec train``. ``needs_calibration``: wants parameters that
    :meth:`calibrate` makes from calibration runs; ``schedule_bound``: those serve one schedule only. ``min_budget``: the
    fewest computed steps that it works with.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cut: ClassVar[Cut] = "hidden"
    needs_training: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    schedule_bound: ClassVar[bool] = False
    min_budget: ClassVar[int] = 1
    default_interval: ClassVar[int]
    extra_steps: ClassVar[tuple[int, ...]] = ()

    @abstractmethod
    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> Table:
        """The numbers for ``schedule`` on noise levels ``sigmas`` [T + 1]. Pure.

        Raises:
            InputError: the schedule does not fit the method.
        """

    def calibrate(self, calibration: "Calibration", schedule: Schedule) -> Parameters:
        """Parameters from calibration runs, for :meth:`table` with the same schedule."""
        raise PredictorError(f"method {self.name!r} has nothing to calibrate; compile it as it is")

    def draft(self) -> "Method":
        """The method at its cheapest, for searches that fit it to many schedules."""
        return self

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The method's own published schedule."""
        return interval_schedule(num_steps, interval, extra=self.extra_steps)

    def published(self, num_steps: int, budget: int) -> Schedule:
        """The method's own published schedule with at most ``budget`` computed steps.

        Raises:
            InputError: there is none.
        """
        return interval_for_budget(num_steps, budget, extra=self.extra_steps)

    @classmethod
    def with_options(cls, options: Mapping[str, str]) -> Self:
        """Make the method from ``--set`` options.

        Raises:
            InputError: an option is unknown, or its value is not of its type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in fields:
                if not fields:
                    raise InputError(f"method {cls.name!r} has no options, so {key}={text} cannot be set")
                raise unknown_name(f"option of method {cls.name!r}", key, fields)
            values[key] = _parse_option(key, text, fields[key].type)
        return cls(**values)

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _parse_option(key: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError as error:
        raise InputError(f"option {key} is {text!r}; it must be a {'whole ' if kind is int else ''}number") from error
    if not math.isfinite(value):
        raise InputError(f"option {key} is {text!r}; it must be finite")
    return value


@dataclass(frozen=True)
class PredictorMethod(Method):
    """A method that is a graph of past features.

    ``feeds_back``: the history holds every earlier step, forecasts included, and not only computed ones.
    """

    feeds_back: ClassVar[bool] = False

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

    def histories(self, schedule: Schedule) -> dict[int, tuple[int, ...]]:
        """Which steps each forecast looks at, newest first."""
        return {step: schedule.history(step, self.window, feeds_back=self.feeds_back) for step in schedule.forecast}

    def row(self, step: int, history: tuple[int, ...], sigmas: Array, parameters: Parameters | None) -> Array:
        """Weights [W] of one forecast on its history, newest first, of an unbiased predictor. A short history is padded."""
        padded = (*history, *[history[-1]] * (self.window - len(history)))
        return _probe_row(self.predictor(parameters), step, padded, torch.as_tensor(np.asarray(sigmas)).float())[0]

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        """The table without the passes: the predictor on a basis of features. Equals what folding finds."""
        predictor = self.predictor(parameters)
        rows, bias = np.zeros((schedule.num_steps, self.window)), np.zeros(schedule.num_steps)
        levels = torch.as_tensor(np.asarray(sigmas)).float()
        for step, history in self.histories(schedule).items():
            rows[step], bias[step] = _probe_row(predictor, step, history, levels)
        return compose(rows, bias, schedule, feeds_back=self.feeds_back)


@torch.no_grad()
def _probe_row(predictor: Predictor, step: int, history: tuple[int, ...], sigmas: torch.Tensor) -> tuple[Array, float]:
    """Weights [W] and bias of an affine, elementwise predictor: its values at zero and at unit features."""
    window = len(history)
    basis = torch.cat([torch.zeros(window, 1), torch.eye(window)], dim=1).float()  # feature j is 1 in column j + 1
    values = predictor([row[None, None] for row in basis], torch.tensor(history), sigmas,
                       torch.tensor(step))[0, 0].double().numpy()  # fmt: skip
    return values[1:] - values[0], float(values[0])


@dataclass(frozen=True)
class TableMethod(Method):
    """A method that states its numbers: only :meth:`Method.table`, no graph."""
