"""A Kolmogorov-Arnold network with cubic B-splines on a uniform grid, in operations that every back end has.

Source: the layer is "efficient-kan"'s KANLinear (which LESA uses), with the same parameters and initialisation. Its
Cox-de Boor recursion is replaced by the closed form of the uniform cubic B-spline, which equals it on a uniform grid:
B(u) = (relu(2 - |u|)^3 - 4 relu(1 - |u|)^3) / 6.
"""

import math

import torch
from torch import nn

ORDER = 3


class KanLinear(nn.Module):
    """``y = W_base silu(x) + sum_g (W_spline scaler)_g B_g(x)``; [..., in] to [..., out].

    ``grid_size`` intervals over ``grid_range``, so ``grid_size + 3`` basis functions per input.
    """

    def __init__(self, num_in: int, num_out: int, *, grid_size: int = 5, grid_range: tuple[float, float] = (-3, 3)) -> None:
        super().__init__()
        low, high = grid_range
        self.centres: torch.Tensor
        self.spacing = (high - low) / grid_size
        num_bases = grid_size + ORDER
        self.register_buffer("centres", low + self.spacing * (torch.arange(num_bases) - 1.0), persistent=False)
        self.base_weight = nn.Parameter(torch.empty(num_out, num_in))
        self.spline_weight = nn.Parameter(torch.empty(num_out, num_in, num_bases))
        self.spline_scaler = nn.Parameter(torch.empty(num_out, num_in))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5) * 1.0)
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5) * 0.2)
        self._initialise_spline(grid_size, low)

    @torch.no_grad()
    def _initialise_spline(self, grid_size: int, low: float, noise_scale: float = 0.02) -> None:
        """Fit the splines to small noise at the grid points, by least squares."""
        num_out, num_in, _ = self.spline_weight.shape
        points = low + self.spacing * torch.arange(grid_size + 1)
        noise = (torch.rand(grid_size + 1, num_in * num_out) - 0.5) * noise_scale / grid_size
        solution = torch.linalg.lstsq(self.bases(points[:, None])[:, 0], noise, driver="gelsd").solution
        self.spline_weight.copy_(solution.T.reshape(num_in, num_out, -1).transpose(0, 1))

    def bases(self, x: torch.Tensor) -> torch.Tensor:
        """B-spline bases of ``x`` [..., in]: [..., in, num_bases]."""
        u = ((x[..., None] - self.centres) / self.spacing).abs()
        near, far = torch.relu(1 - u), torch.relu(2 - u)
        return (far * far * far - 4 * near * near * near) / 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spline = (self.spline_weight * self.spline_scaler[..., None]).flatten(1)
        base = nn.functional.linear(nn.functional.silu(x), self.base_weight)
        return base + nn.functional.linear(self.bases(x).flatten(-2), spline)


class Kan(nn.Sequential):
    """Layers of sizes ``widths``; [..., widths[0]] to [..., widths[-1]]."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__(*(KanLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)))
