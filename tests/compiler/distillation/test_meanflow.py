"""Restricted MeanFlow: the loss beside the formula written out, differences beside derivatives, times within their bounds."""

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from cachec.compiler.distillation.meanflow import Distilling, derivative_along, draw_times, meanflow_loss
from cachec.runtime.errors import InputError

BATCH, TOKENS, WIDTH = 3, 5, 8


class Small(nn.Module):
    """Attention between tokens, and both times embedded as diffusers embeds them: with waves of a thousandth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.waves = nn.Linear(32, WIDTH), Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, r):
        embedded = self.time(torch.cat([self.waves(1000 * t), self.waves(1000 * r)], -1))
        parts = self.project(x + embedded[:, None]).chunk(3, -1)
        return self.out(scaled_dot_product_attention(*(part[:, None] for part in parts))[:, 0])


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for _ in range(2))
    return x, torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.7, 0.5, 0.2]), v


def test_the_loss_and_its_gradient_are_those_of_the_formula(given):
    net, (x, t, r, v) = Small(), given
    meanflow_loss(net, x, t, r, v, "exact").backward()
    found = {name: value.grad.clone() for name, value in net.named_parameters()}
    net.zero_grad()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobians = [
            torch.autograd.functional.jacobian(lambda x, t, i=i: net(x, t, r)[i].flatten(), (x, t)) for i in range(BATCH)
        ]
    along = torch.stack([(by_x.flatten(1) @ v.flatten() + by_t.sum(1)).view(TOKENS, WIDTH) for by_x, by_t in jacobians])
    u = net(x, t, r)
    loss = 0
    for i in range(BATCH):
        error = (u[i] - (v[i] - (t[i] - r[i]) * along[i])).square().mean()
        loss = loss + error / (error.detach() + 1e-3) / BATCH
    torch.testing.assert_close(meanflow_loss(net, x, t, r, v, "exact"), loss)
    loss.backward()
    for name, value in net.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-5)


def test_differences_are_near_the_derivative(given):
    net, (x, t, r, v) = Small(), given
    exact = derivative_along(net, x, t, r, v, "exact")
    off = (derivative_along(net, x, t, r, v, "difference", width=1e-4) - exact).norm() / exact.norm()
    assert 0 < off < 5e-3


def test_wide_differences_see_past_the_fastest_waves(given):
    def waving(x, t, r):
        return x + (t**2 + 1e-3 * torch.sin(1000 * t)).view(-1, 1, 1)

    x, _, r, v = given
    t = torch.tensor([1.0, 0.5, 0.3])
    smooth = v + (2 * t).view(-1, 1, 1)
    off = {how: (derivative_along(waving, x, t, r, v, how) - smooth).abs().max() for how in ("exact", "difference")}
    assert off["difference"] < 0.1 < 0.5 < off["exact"]


def test_an_operator_without_a_rule_is_said(given):
    def fused(x, t, r):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[x[:, None]] * 3)[0]

    with pytest.raises(InputError, match="cannot be differentiated forwards .* take --derivative difference"):
        derivative_along(fused, *given, "exact")


def test_where_times_are_one_the_target_is_the_teachers_velocity(given):
    x, t, _, v = given
    assert meanflow_loss(lambda x, t, r: v + 0 * x, x, t, t, v).item() == 0


@pytest.mark.parametrize("restrict", [0.2, 1.0])
def test_intervals_are_within_their_bounds(restrict):
    levels = torch.tensor([1.0, 0.9, 0.6, 0.0])
    t, r = draw_times(levels, restrict, 4000, torch.Generator().manual_seed(0))
    assert (r >= 0).all()
    assert ((t - r) >= 0).all()
    assert restrict * 0.8 < (t - r).max() <= restrict + 1e-6
    assert 0.2 < (t == r).float().mean() < 0.4
    for high, low in ((1.0, 0.9), (0.9, 0.6), (0.6, 0.0)):  # as the levels are spread: a third in each
        assert abs(((t <= high) & (t > low)).float().mean() - 1 / 3) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restrict": 0.0}, r"restrict is 0\.0; it must be above 0, and 1 at most"),
        ({"restrict": 1.5}, r"restrict is 1\.5"),
        ({"restrict": float("nan")}, "restrict is nan"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"updates": 0}, "updates is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"rate": 0.0}, r"rate is 0\.0"),
        ({"derivative": "exat"}, "unknown derivative 'exat'. Did you mean 'exact'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Distilling(**options)


def test_it_learns_the_average_velocity_of_a_flow():
    """dx/dt = cos(3 t) x: from t down to r it takes x to x exp((sin 3 r - sin 3 t) / 3). Nobody tells the net where it ends."""
    torch.manual_seed(0)
    gain = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(gain.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def average(x, t, r):
        return x * gain(torch.stack([t, r], 1))[:, None]

    def one_step(x):
        return x - average(x, torch.ones(len(x)), torch.zeros(len(x)))

    for _ in range(300):
        x = torch.randn(64, 1, 4, generator=generator)
        t, r = draw_times(torch.linspace(1, 0, 9), 1.0, len(x), generator)
        loss = meanflow_loss(average, x, t, r, torch.cos(3 * t)[:, None, None] * x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.ones(1, 1, 4)
    wanted = x * torch.exp(-torch.sin(torch.tensor(3.0)) / 3)
    plain = x - torch.cos(torch.tensor(3.0)) * x  # Euler's one step
    assert (one_step(x) - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()
