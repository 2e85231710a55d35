"""How close pictures and latents are. Pictures are float in [0, 1]: several papers compute PSNR on uint8, with wrap-around."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cachec.runtime.specs import Array


def psnr_db(picture: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio of one picture [H, W, 3] in dB; infinity for equal pictures."""
    if np.array_equal(picture, reference):
        return math.inf
    return float(peak_signal_noise_ratio(reference, picture, data_range=1.0))


def ssim(picture: Array, reference: Array) -> float:
    """Structural similarity of one picture [H, W, 3]; 1 for equal pictures."""
    return float(structural_similarity(reference, picture, data_range=1.0, channel_axis=2))


def latent_rel_l2(latents: Array, reference: Array) -> float:
    """Distance of latents from reference latents, over the norm of the reference."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


@dataclass(frozen=True)
class Mean:
    """A mean over pictures with its standard error (``None`` where it has none)."""

    value: float | None
    error: float | None


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of the finite values; no value if there is none (all pictures are equal)."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return Mean(None, None)
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error)
