"""LESA: a learned predictor with one small expert per stage of sampling.

Citation:
    "LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration", arXiv 2602.20497, CVPR 2026.

The expert of step s, chosen by its noise level t, gives h_s = h_{s-1} + alpha (sum_m w_m h_{s-1-m} + b) with
alpha = KAN(t - t_0, …, t - t_T): the KAN sees differences of noise levels only, so for a fixed schedule alpha is one
number a step, and the whole predictor folds into coefficients.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from cachec.compiler.methods.base import PredictorMethod, TrainingData
from cachec.compiler.methods.kan import Kan
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.predictor import Predictor
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import BRANCHES, GUIDANCE
from cachec.runtime.errors import InputError, PredictorError, shortened, unknown_name
from cachec.runtime.specs import Array

STAGE_BOUNDS = (0.9, 0.5)  # expert 0 above the first, 1 above the second, 2 below
ANY, APART, SHARED = SHARINGS = "any", "apart", "shared"  # whose a predictor is, where guidance has two branches
WINDOWS = (4, 8, 8)
HIDDEN = 256


class LesaPredictor(Predictor):
    """Three experts: a KAN [T + 1, 256, 256, 1] and a linear map over the window, with bias, each.

    ``bounds``: expert 0 forecasts above the first noise level, 1 above the second, 2 below.
    """

    def __init__(self, num_steps: int, bounds: tuple[float, float] = STAGE_BOUNDS) -> None:
        super().__init__()
        self.bounds = bounds
        self.kans = nn.ModuleList(Kan([num_steps + 1, HIDDEN, HIDDEN, 1]) for _ in WINDOWS)
        self.mixes = nn.ModuleList(nn.Linear(window, 1) for window in WINDOWS)

    def numbers(self, sigmas: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the schedule decides: ``alpha`` [], window weights [8] (zero beyond the expert's own), bias []."""
        t = torch.index_select(sigmas, 0, step.reshape(1))
        expert = (t <= self.bounds[0]).long() + (t <= self.bounds[1]).long()
        alphas = torch.cat([kan(t - sigmas) for kan in self.kans])
        mixes = cast("list[nn.Linear]", list(self.mixes))
        weights = torch.cat([nn.functional.pad(mix.weight, (0, max(WINDOWS) - mix.in_features)) for mix in mixes])
        biases = torch.cat([mix.bias for mix in mixes])
        return (
            torch.index_select(alphas, 0, expert)[0],
            torch.index_select(weights, 0, expert)[0],
            torch.index_select(biases, 0, expert)[0],
        )

    def forward(
        self, features: Sequence[torch.Tensor], history_steps: torch.Tensor, sigmas: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        alpha, weights, bias = self.numbers(sigmas, step)
        mixed = sum(feature * weights[m] for m, feature in enumerate(features)) + bias
        return features[0] + alpha * mixed


class LesaBranches(nn.Module):
    """A predictor for each branch of guidance, of features that lie side by side."""

    def __init__(self, num_steps: int, bounds: tuple[float, float] = STAGE_BOUNDS) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: LesaPredictor(num_steps, bounds) for name in BRANCHES})

    def forward(
        self,
        features: Sequence[torch.Tensor],
        history_steps: torch.Tensor,
        sigmas: torch.Tensor,
        step: torch.Tensor,
        num_negative: int,
    ) -> torch.Tensor:
        """As a ``Predictor``'s; the first ``num_negative`` tokens are of the negative branch."""
        sizes = [num_negative, features[0].shape[1] - num_negative]
        halves = zip(*(torch.split(feature, sizes, 1) for feature in features), strict=True)
        made = [self.branches[name](half, history_steps, sigmas, step) for name, half in zip(BRANCHES, halves, strict=True)]
        return torch.cat(made, 1)


@dataclass(frozen=True)
class Lesa(PredictorMethod):
    """Learned; window 8 over every step's feature (forecasts are fed back), warm-up 3 steps plus step 3.

    Trained for one model, number of steps and interval, and of no use for others. Starts as plain reuse. ``max_rounds``
    ends a phase of training that has not stopped by itself.

    Where guidance is true each of its ``branches`` has a predictor (``apart``), as in the code released for Qwen-Image, or both
    have one, trained on both (``shared``): the samplers of many pipelines do not say which branch a call is of, and on our
    tiny-qwen it is better at N = 7. ``second_bound``: the noise level below which the third expert forecasts, 0.5 as released
    for FLUX and HunyuanVideo; that for Qwen-Image has 0.4. ``any`` and 0: as the file has it, shared and 0.5 if trained now.
    """

    name: ClassVar[str] = "lesa"
    summary: ClassVar[str] = "trained stage experts with a KAN over the schedule (LESA)"
    feeds_back: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7
    min_budget: ClassVar[int] = 4
    extra_steps: ClassVar[tuple[int, ...]] = (3,)
    max_rounds: int = 240
    branches: str = ANY
    second_bound: float = 0.0

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise InputError(f"max_rounds is {self.max_rounds}; it must be at least 1")
        if self.branches not in SHARINGS:
            raise unknown_name("branches", self.branches, SHARINGS)
        if not 0 <= self.second_bound < STAGE_BOUNDS[0]:
            raise InputError(f"second_bound is {self.second_bound}; it is a noise level above 0 and below {STAGE_BOUNDS[0]}")

    @property
    def window(self) -> int:
        return max(WINDOWS)

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        from cachec.compiler.methods.lesa_training import LesaTrainer

        bounds = STAGE_BOUNDS[0], self.second_bound or STAGE_BOUNDS[1]
        trainer = LesaTrainer(data, max_rounds=self.max_rounds, bounds=bounds, apart=self.branches == APART)
        arrays = trainer.run()
        facts = {**trainer.facts(), "second_bound": str(bounds[1])}
        if GUIDANCE in data.train.conditions:
            facts["branches"] = APART if self.branches == APART else SHARED
        return arrays, facts

    def weighs_rows(self, parameters: Parameters | None) -> bool:
        return parameters is not None and bool(_branches_of(parameters))

    def trained_facts(self, *, guided: bool) -> dict[str, str]:
        bound = {"second_bound": str(self.second_bound)} if self.second_bound else {}
        return {**bound, **({"branches": self.branches} if guided and self.branches != ANY else {})}

    def check_inlined(self, model: LoadedModel, settings: Settings, parameters: Parameters | None) -> None:
        if parameters is not None:
            self.predictor(parameters)
        elif self.branches == APART and model.is_guided(settings):
            raise InputError(
                "fold is none, and lesa has a predictor for each branch of guidance, while an engine runs both as rows of one "
                "batch: use static, or one predictor that both share (--set branches=shared)"
            )

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        apart = () if parameters is None else _branches_of(parameters)
        tables = [super(Lesa, self).table(schedule, sigmas, one) for one in apart or (parameters,)]
        return ForecastTable.of_branches(*tables) if apart else tables[0]

    def predictor(self, parameters: Parameters | None) -> Predictor:
        if parameters is None:
            raise PredictorError("lesa needs a trained predictor: run cachec train, or let cachec compile train one")
        if _branches_of(parameters):
            raise PredictorError(f"{parameters.origin} holds a predictor for each branch of guidance; an engine takes one that "
                                 "both share (--set branches=shared)")  # fmt: skip
        predictor = LesaPredictor(int(parameters.facts["steps"]), (STAGE_BOUNDS[0], _second_bound(parameters)))
        try:
            predictor.load_state_dict({name: torch.from_numpy(array) for name, array in parameters.arrays.items()})
        except RuntimeError as error:
            raise PredictorError(f"{parameters.origin} does not hold a LESA predictor: {error}") from error
        return predictor.eval()


@functools.lru_cache(maxsize=16)  # what is folded is remembered by these objects
def _branches_of(parameters: Parameters) -> tuple[Parameters, ...]:
    """The parameters of each branch of guidance; none if both share theirs. Raises ``PredictorError``: they are of one only."""
    found, rest = [], set(parameters.arrays)
    for name in BRANCHES:
        prefix = f"branches.{name}."
        own = {key.removeprefix(prefix): array for key, array in parameters.arrays.items() if key.startswith(prefix)}
        rest -= {f"{prefix}{key}" for key in own}
        found += [Parameters(own, parameters.facts, f"{parameters.origin} ({name} branch)")] if own else []
    if found and (rest or len(found) < len(BRANCHES)):
        raise PredictorError(f"{parameters.origin} does not hold a LESA predictor of each branch of guidance, and nothing else")
    return tuple(found)


def _second_bound(parameters: Parameters) -> float:
    """What the file says, if it says it. Raises ``PredictorError`` unless that is a noise level below the first bound."""
    text = parameters.facts.get("second_bound", str(STAGE_BOUNDS[1]))
    try:
        bound = float(text)
    except ValueError:
        bound = float("nan")
    if not 0 < bound < STAGE_BOUNDS[0]:
        raise PredictorError(f"{parameters.origin}: second_bound is {shortened(text)}, no noise level below {STAGE_BOUNDS[0]}")
    return bound
