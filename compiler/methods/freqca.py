"""Repeat what is low in frequency over the tokens, extrapolate what is high.

Citation:
    "FreqCa: Accelerating Diffusion Models via Frequency-Aware Caching", arXiv 2510.08669, NeurIPS 2026; bands, orders and
    Hermite polynomials are those of the released code (Tammytcl/FreqCa), without its experimental look-ahead.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cachec.compiler.methods.base import CodedMethod
from cachec.compiler.methods.hicache import hermite_rows
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.taylor import WARMUP
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.graphs.coding import Coding

TRANSFORMS = ("dct", "fft")


@dataclass(frozen=True)
class FreqCa(CodedMethod):
    """Order 0 in the low band, ``order`` in the high one; warm-up 3 steps, ``order + 1`` slots, hidden cut.

    With U [r, L] the orthonormal waves of low frequency over the L tokens, a feature is kept as ``[U F; F - U^T U F]``: of the
    low band its r numbers a channel, which adds r / L to a slot. The forecast of the low band is its last value, that of the
    high band HiCache's with ``sigma`` 0.71, which is Taylor's less half the second difference. ``transform``: ``dct`` over the
    grid of tokens of a picture, frequencies up to ``cutoff`` of the largest, as for FLUX; ``fft`` over the tokens in a row, as
    for Qwen-Image, which takes any feature. Exact on constant features only. The low band, which holds most of a feature,
    lags behind as plain reuse does; on a small grid it is little more than the mean.
    """

    name: ClassVar[str] = "freqca"
    summary: ClassVar[str] = "repeat low frequencies over the tokens, extrapolate high ones (FreqCa)"
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = WARMUP
    transform: str = "dct"
    cutoff: float = 0.1
    order: int = 2
    sigma: float = 0.71

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise InputError(f"transform is {self.transform!r}; freqca takes {' or '.join(TRANSFORMS)}")
        if not 0 <= self.cutoff < 1:
            raise InputError(
                f"cutoff is {self.cutoff}, outside the grid of frequencies: freqca takes 0 to below 1, which is all"
            )
        if not 0 <= self.order <= 8:
            raise InputError(f"order is {self.order}; freqca takes 0 to 8")
        if not 0 < self.sigma <= 1:
            raise InputError(f"sigma is {self.sigma}; freqca takes more than 0, up to 1")

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        low, high = (hermite_rows(schedule, order, self.sigma) for order in (0, self.order))
        return ForecastTable.of_rows(schedule, low, high)

    def coding(self, feature: tuple[int, ...], settings: Settings, parameters: Parameters | None) -> "Coding":
        from cachec.compiler.methods.projections import token_bands

        tokens = feature[0]
        waves = (
            low_waves(tokens, self.cutoff) if self.transform == "fft" else low_cosines(*_grid(tokens, settings), self.cutoff)
        )
        return token_bands(waves)


def _grid(tokens: int, settings: Settings) -> tuple[int, int]:
    """Rows and columns of a picture's tokens.

    Raises:
        InputError: they are not a picture's.
    """
    columns = math.isqrt(tokens * settings.width // settings.height)
    rows = tokens // columns if columns else 0
    if settings.frames > 1 or rows * columns != tokens or rows * settings.width != columns * settings.height:
        raise InputError(
            f"{tokens} tokens are no grid of a picture of {settings.size}, as transform dct takes it: give --set transform=fft"
        )
    return rows, columns


def low_cosines(rows: int, columns: int, cutoff: float) -> Array:
    """Orthonormal cosines [r, rows * columns] of the DCT-II with frequency (h, w) in a radius of ``cutoff`` of the largest."""
    h, w = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    radius = np.hypot(h, w)
    low = radius <= cutoff * radius.max()
    return np.stack([np.outer(_cosine(i, rows), _cosine(j, columns)).reshape(-1) for i, j in zip(h[low], w[low], strict=True)])


def _cosine(frequency: int, length: int) -> Array:
    """A row of the orthonormal DCT-II."""
    wave = np.cos(np.pi * frequency * (np.arange(length) + 0.5) / length)
    scaled: Array = wave * np.sqrt((1 if frequency == 0 else 2) / length)
    return scaled


def low_waves(tokens: int, cutoff: float) -> Array:
    """Orthonormal real waves [r, L] of the discrete Fourier transform with frequencies up to ``cutoff`` of the largest."""
    place, found = np.arange(tokens), [np.full(tokens, tokens**-0.5)]
    for k in range(1, int(cutoff * (tokens // 2) + 1e-9) + 1):
        if 2 * k == tokens:  # the largest frequency of an even number is one wave
            found.append(np.cos(np.pi * place) * tokens**-0.5)
            continue
        angle = 2 * np.pi * k * place / tokens
        found += [np.cos(angle) * (2 / tokens) ** 0.5, np.sin(angle) * (2 / tokens) ** 0.5]
    return np.stack(found)
