"""The KAN layer against the textbook's, which efficient-kan uses."""

import torch
from toy_lesa import textbook_kan

from cachec.compiler.methods.kan import Kan


def test_a_kan_is_the_textbooks():
    torch.manual_seed(0)
    kan = Kan([7, 16, 5])
    torch.nn.init.normal_(kan[0].spline_weight)
    for _ in range(20):
        x = 6 * torch.rand(7) - 3
        expected = textbook_kan(kan, x)
        with torch.no_grad():
            torch.testing.assert_close(kan(x).double(), expected, atol=1e-6 * expected.abs().max().item(), rtol=0)
