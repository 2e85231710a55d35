"""Predictors of features, also those that cannot be folded."""

import torch
from toy import WIDTH
from toy_bundle import STEPS

from cachec.compiler.methods.lesa import LesaPredictor
from cachec.compiler.methods.predictor import Predictor


def random_lesa():
    torch.manual_seed(3)
    return LesaPredictor(STEPS)


class Formula(Predictor):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.register_buffer("channels", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, features, history_steps, sigmas, step):
        return self.formula(self, *features)


UNFOLDABLE = {
    "square": lambda p, f0, f1: f0 * f0,
    "product": lambda p, f0, f1: f0 * f1,
    "relu": lambda p, f0, f1: torch.relu(f0),
    "norm": lambda p, f0, f1: torch.nn.functional.layer_norm(f0, (f0.shape[-1],)) + f1,
    "mean over tokens": lambda p, f0, f1: f0 + f1.mean(dim=1, keepdim=True),
    "channels reversed": lambda p, f0, f1: f0.flip(-1) + f1,
    "growing by channel": lambda p, f0, f1: f0 * torch.cumsum(torch.ones_like(f0), -1) + f1,
    "weight per channel": lambda p, f0, f1: f0 * p.channels + f1,
    "bias per channel": lambda p, f0, f1: f0 + f1 + p.channels,
}
