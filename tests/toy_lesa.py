"""LESA predictors with random weights, and their network by the textbook: Cox-de Boor's recursion, in float64."""

import numpy as np
import torch

from cachec.compiler.methods.lesa import LesaBranches, LesaPredictor
from cachec.compiler.methods.parameters import Parameters


def sigmas_of(num_steps, shift=3.16):
    t = np.linspace(1, 0, num_steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def random_lesa(num_steps, seed=0):
    """A predictor with weights far from its start, so that every term of it matters."""
    torch.manual_seed(seed)
    return _random(LesaPredictor(num_steps))


def random_branches(num_steps, seed=0):
    """The same of each branch of guidance."""
    torch.manual_seed(seed)
    pair = LesaBranches(num_steps)
    for predictor in pair.branches.values():
        _random(predictor)
    return pair


@torch.no_grad()
def _random(predictor):
    for kan in predictor.kans:
        kan[-1].base_weight.normal_(0, 0.5)
    for mix in predictor.mixes:
        mix.weight.normal_(0, 0.3)
        mix.bias.normal_(0, 0.3)
    return predictor.eval()


def parameters_of(predictor, num_steps):
    return Parameters({n: v.numpy() for n, v in predictor.state_dict().items()}, {"steps": str(num_steps)}, "a test")


def cox_de_boor(x, knots, order):
    """Spline bases by the textbook recursion."""
    bases = [((x >= a) & (x < b)).double() for a, b in zip(knots[:-1], knots[1:], strict=True)]
    for k in range(1, order + 1):
        bases = [
            (x - knots[i]) / (knots[i + k] - knots[i]) * bases[i]
            + (knots[i + k + 1] - x) / (knots[i + k + 1] - knots[i + 1]) * bases[i + 1]
            for i in range(len(bases) - 1)
        ]
    return torch.stack(bases, dim=-1)


@torch.no_grad()
def textbook_kan(kan, x):
    """Layers of a :class:`Kan`: W_base silu(x) + sum over inputs and bases of W_spline scaler B(x); grid [-3, 3] in 5."""
    knots, y = [-3 + 1.2 * i for i in range(-3, 9)], x.double()
    for layer in kan:
        base, spline, scaler = (weight.double() for weight in (layer.base_weight, layer.spline_weight, layer.spline_scaler))
        y = base @ (y * torch.sigmoid(y)) + torch.einsum("oib,oi,ib->o", spline, scaler, cox_de_boor(y, knots, 3))
    return y
