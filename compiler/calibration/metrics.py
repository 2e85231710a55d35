"""How close pictures and latents are. Pictures are float in [0, 1]: several papers compute PSNR on uint8, with wrap-around.

A picture is [H, W, 3], or a video [F, H, W, 3].
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cachec.runtime.errors import InputError, missing_extra
from cachec.runtime.specs import Array

Decode = Callable[[Array], Array]  # latents [P, …] to pictures [P, H, W, 3]

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's, as torchmetrics asks for it


def psnr_db(picture: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio of one picture, or of all of a video, in dB; infinity for equal ones."""
    if np.array_equal(picture, reference):
        return math.inf
    return float(-10 * np.log10(np.mean(np.square(picture - reference), dtype=np.float64)))


def ssim(picture: Array, reference: Array) -> float:
    """Structural similarity of one picture, or the mean over a video's frames; 1 for equal ones.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    if find_spec("skimage") is None:
        raise missing_extra("scikit-image", "compile", "the structural similarity of pictures")
    from skimage.metrics import structural_similarity

    pairs = zip(_frames(reference), _frames(picture), strict=True)
    return float(np.mean([structural_similarity(*pair, data_range=1.0, channel_axis=2) for pair in pairs]))


def _frames(picture: Array) -> Array:
    """[F, H, W, 3]: a picture is a video of one frame."""
    return picture[None] if picture.ndim == 3 else picture


def latent_rel_l2(latents: Array, reference: Array) -> float:
    """Distance of latents from reference latents, over the norm of the reference."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


@dataclass(frozen=True)
class Lpips:
    """Learned perceptual distance (arXiv 1801.03924, AlexNet), or the reason why there is none here."""

    network: Any | None
    reason: str | None = None

    def distance(self, picture: Array, reference: Array) -> float | None:
        """Distance of two pictures, or the mean over frames, 0 for equal ones; ``None`` if it is not available."""
        if self.network is None:
            return None
        import torch

        pair = (
            torch.from_numpy(np.ascontiguousarray(_frames(p), np.float32)).permute(0, 3, 1, 2) for p in (picture, reference)
        )
        with torch.no_grad():
            return float(self.network(*pair))


def find_lpips() -> Lpips:
    """LPIPS if its code and its weights are on this machine; nothing is ever downloaded."""
    if missing := [name for name in ("torchmetrics", "torchvision") if find_spec(name) is None]:
        return Lpips(None, f"{' and '.join(missing)} not installed: pip install torchmetrics torchvision")
    import torch

    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE).is_file():
        return Lpips(
            None, f"no AlexNet weights in torch's cache: fetch them with python -c 'import torchvision; "
            f"torchvision.models.alexnet(weights=\"IMAGENET1K_V1\")' ({LPIPS_BACKBONE})",
        )  # fmt: skip
    module = importlib.import_module("torchmetrics.image.lpip")
    return Lpips(module.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True))


@dataclass(frozen=True)
class Mean:
    """A mean over pictures with its standard error (``None`` where it has none)."""

    value: float | None
    error: float | None


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error over the pictures that are not equal (infinity); no value if all are.

    Raises:
        InputError: a value is NaN.
    """
    if any(math.isnan(value) for value in values):
        raise InputError(f"picture {[math.isnan(v) for v in values].index(True) + 1} is not a number: the run gave NaN")
    values = [value for value in values if not math.isinf(value)]
    if not values:
        return Mean(None, None)
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error)


LESS_IS_BETTER = ("latent_error",)
DIGITS: Mapping[str, int] = {"ssim": 5, "latent_error": 6}  # after the point; 3 for others


def summarize_metric(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """What rows and levels carry of a metric, from its values by picture: the mean, and how bad it gets.

    ``psnr_db`` and ``ssim``: ``NAME``, ``NAME_stderr``, ``NAME_p5`` (5th percentile, a value that occurred) and ``NAME_min``.
    ``latent_error``: ``NAME``, ``NAME_p95`` and ``NAME_max``. ``None`` where all pictures are equal (see :func:`mean`).

    Raises:
        InputError: a value is NaN.
    """
    average = mean(values)
    if name in LESS_IS_BETTER:
        worst = {f"{name}_p95": np.percentile(values, 95, method="higher"), f"{name}_max": np.max(values)}
        found: dict[str, float | None] = {name: average.value, **worst}
    else:
        worst = {f"{name}_p5": np.percentile(values, 5, method="lower"), f"{name}_min": np.min(values)}
        found = {name: average.value, f"{name}_stderr": average.error, **worst}
    return {key: _finite(value, DIGITS.get(name, 3)) for key, value in found.items()}


def _finite(value: float | None, digits: int) -> float | None:
    return None if value is None or math.isinf(value) else round(float(value), digits)
