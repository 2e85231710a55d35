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
    are equal; ``lpips`` as :class:`Lpips` has it; ``attributes`` by name: the share of ``num_items`` items read right.
    """

    psnr_db: float
    psnr_db_fine: float
    ssim: float
    latent_error: float
    loop_seconds: float
    total_seconds: float
    lpips: float | None = None
    attributes: Mapping[str, float] = field(default_factory=dict)
    num_items: int = 0


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
    seconds = [one.loop_seconds for one in measured]
    row: dict[str, Any] = {"name": name, "kind": kind, "compute_steps": compute_steps}
    for key, numbers in values.items():
        row |= summarize_metric(key, numbers)
    return row | {
        "lpips": round(statistics.fmean(distances), 5) if distances else None,
        "attributes": {key: round(share, 4) for key, share in attributes.items()} or None,
        "attribute_accuracy": round(statistics.fmean(attributes.values()), 4) if attributes else None,
        "seconds_loop": round(loops[name], 5),
        "seconds_loop_quartiles": [round(float(q), 5) for q in np.percentile(seconds, [25, 75])],
        "seconds_total": round(statistics.median(one.total_seconds for one in measured), 5),
        "speedup_vs_uncached": round(loops["uncached"] / loops[name], 3),
        "speedup_vs_eager": round(loops["diffusers"] / loops[name], 3),
        "psnr_db_by_prompt": _finite(values["psnr_db"]),
        "psnr_db_fine_by_prompt": _finite(values["psnr_db_fine"]),
    }


def _attributes(measured: Sequence[Measured]) -> dict[str, float]:
    """Share of all items that were read right, by attribute."""
    asked = [one for one in measured if one.num_items]
    names = asked[0].attributes if asked else ()
    total = sum(one.num_items for one in asked)
    return {name: sum(one.attributes[name] * one.num_items for one in asked) / total for name in names}


def _finite(values: Sequence[float]) -> list[float | None]:
    return [round(value, 3) if math.isfinite(value) else None for value in values]
