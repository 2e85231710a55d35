"""LESA predictors with random weights."""

import numpy as np
import torch

from cachec.compiler.methods.lesa import LesaPredictor
from cachec.compiler.methods.parameters import Parameters


def sigmas_of(num_steps, shift=3.16):
    t = np.linspace(1, 0, num_steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def random_lesa(num_steps, seed=0):
    """A predictor with weights far from its start, so that every term of it matters."""
    torch.manual_seed(seed)
    predictor = LesaPredictor(num_steps)
    with torch.no_grad():
        for kan in predictor.kans:
            kan[-1].base_weight.normal_(0, 0.5)
        for mix in predictor.mixes:
            mix.weight.normal_(0, 0.3)
            mix.bias.normal_(0, 0.3)
    return predictor.eval()


def parameters_of(predictor, num_steps):
    return Parameters({n: v.numpy() for n, v in predictor.state_dict().items()}, {"steps": str(num_steps)}, "a test")
