"""What a method is: a way to forecast at a cut, and the facts that compiling it needs.

A :class:`PredictorMethod` is a graph of past features; ``predictor.py`` folds it to numbers (with ``passes/fold_predictor.py``,
an analysis that stands in no list of passes). A :class:`TableMethod` states its numbers directly, and so does a
:class:`CodedMethod`, of parts of features that it keeps in a code. A :class:`BlockMethod` is the model with other blocks, which
reads the latents, too: it never folds.
Of the others the result is a table: a ``ForecastTable`` on the hidden cut, an ``AdvanceTable`` on the output cut
(``compiler/tables/coefficients.py``). With ``--fold none`` there is none: a pass inlines the predictor into the forecast graph.

Shapes: ``B`` batch, ``L`` tokens, ``D`` channels, ``T`` steps, ``K`` computed steps, ``W`` window, ``P`` prompts.
"""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.runs import Trajectories
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.released import Released
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.coefficients import ForecastTable, Table, compose
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule, interval_for_budget, interval_schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

if TYPE_CHECKING:  # a method imports without torch unless it is a graph
    from cachec.compiler.graphs.coding import Coding
    from cachec.compiler.methods.predictor import Predictor
    from cachec.compiler.models.blocks import BlockPredictor


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a method is trained on: the model, recorded runs, and runs that only tell when to stop."""

    evaluator: Evaluator
    sampling: Sampling
    train: Trajectories
    held_out: Trajectories
    schedule: Schedule
    seed: int
    work: Path


@dataclass(frozen=True)
class Method(ABC):
    """A way to forecast; its fields are its options (``--set name=value``).

    ``folds``: its forecasts can be numbers.
    ``needs_training``: wants parameters from ``cachec train``. ``needs_calibration``: wants parameters that
    :meth:`calibrate` makes from calibration runs; ``schedule_bound``: those serve one schedule only. ``needs_gradients``: of
    the model, for that. ``min_budget``: the fewest computed steps that it works with. ``released``: weights that its authors
    released, in words, which :meth:`read_released` reads.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cut: ClassVar[Cut] = "hidden"
    needs_training: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    schedule_bound: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    min_budget: ClassVar[int] = 1
    released: ClassVar[str | None] = None
    default_interval: ClassVar[int]
    extra_steps: ClassVar[tuple[int, ...]] = ()
    folds: ClassVar[bool] = True

    @abstractmethod
    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> Table:
        """The numbers for ``schedule`` on noise levels ``sigmas`` [T + 1]. Pure.

        A schedule may begin at a later step: nothing before ``schedule.start`` was computed or forecast.

        Raises:
            InputError: the schedule does not fit the method.
        """

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        """Parameters from calibration runs, for :meth:`table` with the same schedule."""
        raise PredictorError(f"method {self.name!r} has nothing to calibrate; compile it as it is")

    @property
    def is_pure(self) -> bool:
        """Are its numbers made of a schedule alone, so that there are some for any?"""
        return not (self.needs_training or self.needs_calibration)

    @classmethod
    def read_released(cls, paths: Sequence[Path], options: Mapping[str, str]) -> Released:
        """The authors' weights, for :meth:`table`; ``options`` say what their files do not.

        Raises:
            PredictorError: there are none, or the files are pickled, damaged, or hold something else.
            InputError: an option is unknown or missing.
        """
        raise PredictorError(f"no weights of {cls.name} are known to be released")

    def check(self, model: LoadedModel, settings: Settings) -> None:
        """Raise ``InputError`` unless the method can be of this model at these settings, before anything slow."""

    def check_budgets(self, parameters: Parameters | None, budgets: Sequence[int]) -> None:
        """Raise ``PredictorError`` where given parameters are for another number of computed steps than is asked for."""

    def weighs_rows(self, parameters: Parameters | None) -> bool:
        """Has its table numbers for each branch of guidance, which are rows of one batch?"""
        return False

    def trained_facts(self, *, guided: bool) -> dict[str, str]:
        """What a predictor file must say beside what it was trained for, to be what the options ask for."""
        return {}

    def draft(self) -> "Method":
        """The method at its cheapest, for searches that fit it to many schedules."""
        return self

    def brief(self) -> "Method":
        """The method at little cost, for choosing among a few schedules: nearly as good as it will be on each."""
        return self

    def finish(self, calibration: Calibration, schedule: Schedule, begun: Parameters) -> Parameters:
        """What :meth:`calibrate` gives, from what that of :meth:`brief` has given for the same runs and schedule."""
        return self.calibrate(calibration, schedule)

    def interval(self, num_steps: int, interval: int) -> Schedule:
        """The method's own published schedule."""
        return interval_schedule(num_steps, interval, extra=self.extra_steps)

    def published(self, num_steps: int, budget: int) -> Schedule:
        """The method's own published schedule with at most ``budget`` computed steps.

        Raises:
            InputError: there is none.
        """
        return interval_for_budget(num_steps, budget, extra=self.extra_steps)

    @property
    def by_pictures(self) -> bool:
        """Is a budget's schedule chosen by pictures, where there are prompts for that?"""
        return False

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

    def options_of(self, parameters: Parameters | None) -> dict[str, Any]:
        """The options, those of training as they were when the parameters were made."""
        own = self.options()
        made = json.loads(parameters.facts.get("options", "{}")) if parameters is not None else {}
        return own | {name: value for name, value in made.items() if name in own}


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
    def predictor(self, parameters: Parameters | None) -> "Predictor":
        """The predictor graph."""

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        """Train; returns the parameters and what is worth knowing about their training."""
        raise PredictorError(f"method {self.name!r} has nothing to train; compile it as it is")

    def check_inlined(self, model: LoadedModel, settings: Settings, parameters: Parameters | None) -> None:
        """Raise unless it can be kept in an engine as a graph, before anything slow; without parameters it is to be trained.

        Raises:
            InputError: not as it is set, for this model at these settings.
            PredictorError: not with these parameters.
        """

    def histories(self, schedule: Schedule) -> dict[int, tuple[int, ...]]:
        """Which steps each forecast looks at, newest first."""
        return {step: schedule.history(step, self.window, feeds_back=self.feeds_back) for step in schedule.forecast}

    def row(self, step: int, history: tuple[int, ...], sigmas: Array, parameters: Parameters | None) -> Array:
        """Weights [W] of one forecast on its history, newest first, of an unbiased predictor. A short history is padded."""
        from cachec.compiler.methods.predictor import fold_rows

        padded = (*history, *[history[-1]] * (self.window - len(history)))
        rows, _ = fold_rows(self, parameters, {step: padded}, sigmas)
        row: Array = rows[step]
        return row

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        """The predictor folded to numbers, in terms of computed features.

        Raises:
            PredictorError: it cannot be folded.
        """
        from cachec.compiler.methods.predictor import fold_rows

        rows, bias = fold_rows(self, parameters, self.histories(schedule), sigmas)
        return compose(rows, bias, schedule, feeds_back=self.feeds_back)


@dataclass(frozen=True, eq=False)
class BlockData:
    """What a predictor made of blocks is trained on: the model, to be run on ``device`` in ``precision``, and runs.

    ``states`` [P, T, …] of uncached runs, the latents before each step; ``branches`` of guidance, the positive one last, each
    with its conditions by name [P, …]. So many of the runs, the last ones, are ``held_out``.
    """

    model: LoadedModel
    settings: Settings
    device: str
    precision: str
    sampling: Sampling
    states: Array
    branches: Sequence[Mapping[str, Array]]
    held_out: int
    schedule: Schedule
    seed: int
    work: Path


@dataclass(frozen=True)
class BlockMethod(Method):
    """A method whose predictor is the model with other blocks in its body (``compiler/models/blocks.py``).

    It reads the current latents, times and conditions, and the tokens of the newest computed step: the one slot that there is.
    It stays in its engine, forecasts run one by one, and one predictor serves every schedule and size.
    """

    folds: ClassVar[bool] = False
    needs_training: ClassVar[bool] = True
    window: ClassVar[int] = 1
    feeds_back: ClassVar[bool] = False

    def check(self, model: LoadedModel, settings: Settings) -> None:
        """Raise ``InputError`` unless the model's blocks are known, and the cut is behind the last of them."""
        _ = model.body
        if settings.cut is not None:
            raise InputError(f"{self.name} keeps the tokens behind the last block: leave --cut {settings.cut} out")
        if model.expert is not None:
            raise InputError(f"{self.name} has the blocks and the tail of one transformer, and the model has two: "
                             "take a method of the output cut (gram, bns, adams)")  # fmt: skip

    @abstractmethod
    def outlined(self, model: LoadedModel) -> "BlockPredictor":
        """A predictor for a model without values: what it takes can be said before it is trained."""

    @abstractmethod
    def blocks(self, model: LoadedModel, parameters: Parameters | None) -> "BlockPredictor":
        """The trained predictor for a model.

        Raises:
            PredictorError: there is none, or it is none for this model.
            InputError: the family does not say how its blocks hang together.
        """

    @abstractmethod
    def fit(self, data: BlockData) -> tuple[dict[str, Array], dict[str, str]]:
        """Train; returns the parameters and what is worth knowing about their training."""

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> Table:
        raise PredictorError(
            f"forecasts of {self.name} are no weighted sums of features, so there are no numbers of them: compile it for the "
            "schedule that you want, by --interval, --budget or a list of steps"
        )


@dataclass(frozen=True)
class TableMethod(Method):
    """A method that states its numbers: only :meth:`Method.table`, no graph."""


@dataclass(frozen=True)
class CodedMethod(Method):
    """A method of the hidden cut that keeps features in a code of its own, which engines are built with.

    :meth:`Method.table` has a row for each group of the code. It is not searched: no statistics of its parts are kept.
    ``num_prompts``: to train it on, at most; ``None``: all that there are.
    """

    num_prompts: ClassVar[int | None] = None

    def check_channels(self, channels: int) -> None:
        """Raise ``InputError`` unless the options fit features of so many channels: before runs are recorded."""

    @abstractmethod
    def coding(self, feature: tuple[int, ...], settings: Settings, parameters: Parameters | None) -> "Coding":
        """How features of a shape, [L, D] of one sample, are kept at these sizes.

        Raises:
            InputError: the method's options do not fit the features.
            PredictorError: it needs parameters, or others.
        """

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        """Train; returns the parameters and what is worth knowing about their training."""
        raise PredictorError(f"method {self.name!r} has nothing to train; compile it as it is")
