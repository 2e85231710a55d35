import torch

from cachec.compiler.methods.kan import KanLinear


def cox_de_boor(x, knots, order):
    """Spline bases by the textbook recursion, which efficient-kan uses."""
    bases = [((x >= a) & (x < b)).double() for a, b in zip(knots[:-1], knots[1:], strict=True)]
    for k in range(1, order + 1):
        bases = [
            (x - knots[i]) / (knots[i + k] - knots[i]) * bases[i]
            + (knots[i + k + 1] - x) / (knots[i + k + 1] - knots[i + 1]) * bases[i + 1]
            for i in range(len(bases) - 1)
        ]
    return torch.stack(bases, dim=-1)


def test_kan_bases_equal_cox_de_boor():
    layer = KanLinear(4, 2)
    x = torch.linspace(-2.99, 2.99, 400).reshape(100, 4)
    knots = [-3 + 1.2 * i for i in range(-3, 9)]
    expected = cox_de_boor(x.double(), knots, 3)
    torch.testing.assert_close(layer.bases(x).double(), expected, atol=1e-5, rtol=0)
