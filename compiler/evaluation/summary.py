"""From what was measured prompt by prompt to one row of the table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cachec.compiler.calibration.metrics import summarize_metric


@dataclass(frozen=True)
class Measured:
    """What one row gave for one prompt.

    PSNR and SSIM against the uncached picture, ``psnr_db_fine`` against that of many steps, in dB and infinite where pictures
    are equal; ``lpips`` as :class:`Lpips` has it; ``attributes``: of those that the
    prompt states, by name, is it read as the prompt says.
    """

    psnr_db: float
    psnr_db_fine: float
    ssim: float
    latent_error: float
    loop_seconds: float
    total_seconds: float
    lpips: float | None = None
    attributes: Mapping[str, bool] = field(default_factory=dict)


def summarize(
    name: str, kind: str, compute_steps: int, measured: Sequence[Measured], loops: Mapping[str, float]
) -> dict[str, Any]:
    """One row, the keys that ``cachec eval --json`` writes; ``loops``: median seconds of the row's and of the other loops.

    Of every metric the mean and the tail, as :func:`summarize_metric` names them; ``None`` where all pictures are equal, and
    for LPIPS and attributes where they are not available. Lists by prompt are in the order of the prompts, for paired
    differences.
    """
    values = {key: [getattr(one, key) for one in measured] for key in ("psnr_db", "psnr_db_fine", "ssim", "latent_error")}
    distances = [one.lpips for one in measured if one.lpips is not None]
    attributes = _attributes(measured)
    read = [right for each in attributes.values() for right in each]
    seconds = [one.loop_seconds for one in measured]
    row: dict[str, Any] = {"name": name, "kind": kind, "compute_steps": compute_steps}
    for key, numbers in values.items():
        row |= summarize_metric(key, numbers)
    return row | {
        "lpips": round(statistics.fmean(distances), 5) if distances else None,
        "attributes": {key: round(statistics.fmean(each), 4) for key, each in attributes.items()} or None,
        "attribute_accuracy": round(statistics.fmean(read), 4) if read else None,
        "seconds_loop": round(loops[name], 5),
        "seconds_loop_quartiles": [round(float(q), 5) for q in np.percentile(seconds, [25, 75])],
        "seconds_total": round(statistics.median(one.total_seconds for one in measured), 5),
        "speedup_vs_uncached": round(loops["uncached"] / loops[name], 3),
        "speedup_vs_eager": round(loops["diffusers"] / loops[name], 3),
        "psnr_db_by_prompt": _finite(values["psnr_db"]),
        "psnr_db_fine_by_prompt": _finite(values["psnr_db_fine"]),
    }


def _attributes(measured: Sequence[Measured]) -> dict[str, list[bool]]:
    """By attribute, whether it was read right of every prompt that states it."""
    found: dict[str, list[bool]] = {}
    for one in measured:
        for name, right in one.attributes.items():
            found.setdefault(name, []).append(right)
    return found


def _finite(values: Sequence[float]) -> list[float | None]:
    return [round(value, 3) if math.isfinite(value) else None for value in values]
