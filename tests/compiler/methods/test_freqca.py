"""FreqCa's bands against Fourier transforms, and its forecasts against the recursion written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from toy_tables import SCHEDULES, differences_by_step, sigmas_of

from cachec.compiler.methods.freqca import FreqCa, low_cosines, low_waves
from cachec.compiler.models.base import Settings
from cachec.runtime.errors import InputError

SETTINGS = Settings(height=96, width=128, text_tokens=8, guidance=1.0, steps=10, dtype="float32")


def fft_bands(x, cutoff):
    """As the released code: x [L, D] into a low and a high band."""
    waves, frequencies = np.fft.fft(x, axis=0), np.abs(np.fft.fftfreq(len(x)))
    low = np.fft.ifft(waves * (frequencies <= cutoff * frequencies.max())[:, None], axis=0).real
    return low, x - low


def dct_bands(x, rows, columns, cutoff):
    waves = dctn(x.reshape(rows, columns, -1), axes=(0, 1), norm="ortho")
    radius = np.hypot(*np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    low = idctn(waves * (radius <= cutoff * radius.max())[..., None], axes=(0, 1), norm="ortho").reshape(x.shape)
    return low, x - low


@pytest.mark.parametrize("cutoff", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("rows", [4, 6])
def test_the_low_band_is_that_of_the_transforms(cutoff, rows):
    x = np.random.default_rng(0).standard_normal((rows * 8, 3))
    for basis, (low, _) in (
        (low_cosines(rows, 8, cutoff), dct_bands(x, rows, 8, cutoff)),
        (low_waves(rows * 8, cutoff), fft_bands(x, cutoff)),
        (low_waves(rows * 8 - 1, cutoff), fft_bands(x[:-1], cutoff)),
    ):
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
        np.testing.assert_allclose(basis.T @ (basis @ x[: len(low)]), low, atol=1e-12)


def released(bands, features, schedule, step):
    """The released code at one step: order 0 for the low band, Hermite of order 2 for the high one."""
    parts = [np.array(part) for part in zip(*(bands(feature) for feature in features), strict=True)]
    forecast = 0.0
    for part, order in zip(parts, (0, 2), strict=True):
        (state, at) = next((state, at) for now, state, at in differences_by_step(part, schedule, order) if now == step)
        for k, difference in state.items():
            x = 0.71 * (step - at)
            forecast = forecast + difference * [1, 2 * x, 4 * x * x - 2][k] / math.factorial(k) * 0.71**k
    return forecast


@pytest.mark.parametrize("transform", ["fft", "dct"])
@pytest.mark.parametrize("name", ["interval 7 of 50", "irregular", "no warm-up"])
def test_it_is_the_released_recursion(name, transform):
    schedule, method = SCHEDULES[name], FreqCa(transform=transform, cutoff=0.3)
    features = np.random.default_rng(1).standard_normal((schedule.num_steps, 48, 5))
    bands = (lambda x: fft_bands(x, 0.3)) if transform == "fft" else (lambda x: dct_bands(x, 6, 8, 0.3))
    coding, table = method.coding((48, 5), SETTINGS, None), method.table(schedule, sigmas_of(schedule.num_steps), None)
    code = coding.encode(torch.from_numpy(features[list(schedule.compute)]).float())
    parts = torch.split(code, list(coding.groups.sizes), 1)
    for step in schedule.forecast:
        rows = torch.from_numpy(table.coefficients[step]).float()
        summed = torch.cat([torch.tensordot(row, part, 1) for row, part in zip(rows, parts, strict=True)], 0)
        got = coding.decode(summed[None])[0].numpy()
        np.testing.assert_allclose(got, released(bands, features, schedule, step), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "wavelet"}, "transform is 'wavelet'; freqca takes dct or fft"),
        ({"cutoff": 1.0}, "cutoff is 1.0, outside the grid of frequencies"),
        ({"cutoff": -0.1}, "cutoff is -0.1, outside the grid"),
        ({"order": 9}, "order is 9"),
        ({"sigma": 0.0}, "sigma is 0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FreqCa(**options)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, frames=4)])
def test_tokens_that_are_no_grid_are_refused(settings):
    with pytest.raises(InputError, match=r"50 tokens are no grid of a picture of 128x96.* give --set transform=fft"):
        FreqCa().coding((50, 4), settings, None)
    assert FreqCa(transform="fft").coding((50, 4), settings, None).groups.sizes[1] == 50
