"""LESA: a learned predictor with one small expert per stage of sampling.

Citation:
    "LESA: Learnable Stage-Aware Predictors for Diffusion Model Acceleration", arXiv 2602.20497, CVPR 2026.

The expert of step s, chosen by its noise level t, gives h_s = h_{s-1} + alpha (sum_m w_m h_{s-1-m} + b) with
alpha = KAN(t - t_0, …, t - t_T): the KAN sees differences of noise levels only, so for a fixed schedule alpha is one
number a step, and the whole predictor folds into coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from cachec.compiler.methods.base import PredictorMethod, TrainingData
from cachec.compiler.methods.kan import Kan
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.predictor import Predictor
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.specs import Array

STAGE_BOUNDS = (0.9, 0.5)  # expert 0 above the first, 1 above the second, 2 below
WINDOWS = (4, 8, 8)
HIDDEN = 256


class LesaPredictor(Predictor):
    """Three experts: a KAN [T + 1, 256, 256, 1] and a linear map over the window, with bias, each."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.kans = nn.ModuleList(Kan([num_steps + 1, HIDDEN, HIDDEN, 1]) for _ in WINDOWS)
        self.mixes = nn.ModuleList(nn.Linear(window, 1) for window in WINDOWS)

    def numbers(self, sigmas: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the schedule decides: ``alpha`` [], window weights [8] (zero beyond the expert's own), bias []."""
        t = torch.index_select(sigmas, 0, step.reshape(1))
        expert = (t <= STAGE_BOUNDS[0]).long() + (t <= STAGE_BOUNDS[1]).long()
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


@dataclass(frozen=True)
class Lesa(PredictorMethod):
    """Learned; window 8 over every step's feature (forecasts are fed back), warm-up 3 steps plus step 3.

    Trained for one model, number of steps and interval, and of no use for others. Starts as plain reuse. ``max_rounds``
    ends a phase of training that has not stopped by itself.

    Not as released: both branches of true guidance share one predictor, trained on both, as they are rows of one batch that
    forecasts by one row of numbers (the released code for Qwen-Image has one each); and the experts' bounds are FLUX's and
    HunyuanVideo's for every model (Qwen-Image's second is 0.4).
    """

    name: ClassVar[str] = "lesa"
    summary: ClassVar[str] = "trained stage experts with a KAN over the schedule (LESA)"
    feeds_back: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7
    min_budget: ClassVar[int] = 4
    extra_steps: ClassVar[tuple[int, ...]] = (3,)
    max_rounds: int = 240

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise InputError(f"max_rounds is {self.max_rounds}; it must be at least 1")

    @property
    def window(self) -> int:
        return max(WINDOWS)

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        from cachec.compiler.methods.lesa_training import LesaTrainer

        trainer = LesaTrainer(data, max_rounds=self.max_rounds)
        return trainer.run(), trainer.facts()

    def predictor(self, parameters: Parameters | None) -> Predictor:
        if parameters is None:
            raise PredictorError("lesa needs a trained predictor: run cachec train, or let cachec compile train one")
        predictor = LesaPredictor(int(parameters.facts["steps"]))
        try:
            predictor.load_state_dict({name: torch.from_numpy(array) for name, array in parameters.arrays.items()})
        except RuntimeError as error:
            raise PredictorError(f"{parameters.origin} does not hold a LESA predictor: {error}") from error
        return predictor.eval()
