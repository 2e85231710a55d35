"""From measurements prompt by prompt to one row of a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cachec.compiler.calibration.metrics import mean


@dataclass
class Measurements:
    """What one row gave, prompt by prompt; ``attributes``: share of its items read right, once an item."""

    psnr: list[float] = field(default_factory=list)
    psnr_fine: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    latent_error: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)
    attributes: dict[str, list[float]] = field(default_factory=dict)


def summarize(name: str, kind: str, compute_steps: int, results: Mapping[str, Measurements]) -> dict[str, Any]:
    """One row. PSNR is ``None`` where all pictures are equal, LPIPS and attributes where they are not available.

    Lists by prompt are in the order of the prompts, for paired differences.
    """
    result = results[name]
    psnr, fine = mean(result.psnr), mean(result.psnr_fine)
    attributes = {key: _rounded(float(np.mean(values)), 4) for key, values in result.attributes.items()}
    loop = statistics.median(result.loop_seconds)
    return {
        "name": name,
        "kind": kind,
        "compute_steps": compute_steps,
        "psnr_db": _rounded(psnr.value),
        "psnr_db_stderr": _rounded(psnr.error),
        "psnr_db_fine": _rounded(fine.value),
        "psnr_db_fine_stderr": _rounded(fine.error),
        "ssim": _rounded(float(np.mean(result.ssim)), 5),
        "latent_rel_l2": _rounded(float(np.mean(result.latent_error)), 6),
        "lpips": _rounded(float(np.mean(result.lpips)), 5) if result.lpips else None,
        "attributes": attributes or None,
        "attribute_accuracy": _rounded(float(np.mean(list(attributes.values()))), 4) if attributes else None,
        "seconds_loop": _rounded(loop, 5),
        "seconds_loop_quartiles": [_rounded(float(q), 5) for q in np.percentile(result.loop_seconds, [25, 75])],
        "seconds_total": _rounded(statistics.median(result.total_seconds), 5),
        "speedup_vs_uncached": _rounded(statistics.median(results["uncached"].loop_seconds) / loop),
        "speedup_vs_eager": _rounded(statistics.median(results["diffusers"].loop_seconds) / loop),
        "psnr_db_by_prompt": _finite(result.psnr),
        "psnr_db_fine_by_prompt": _finite(result.psnr_fine),
    }


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [round(value, 3) if math.isfinite(value) else None for value in values]
