"""Charts of ``bench/QUALITY.md``, one a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

Row = Mapping[str, Any]
OURS, SOLVERS, CACHES = "#d62728", "#1f77b4", "#7f7f7f"
MAX_ROWS = 26


def draw(groups: Mapping[int, Sequence[tuple[str, str, Row]]], path: Path, title: str) -> None:
    """For each budget its rows (label, colour, row), best first: mean with its error, 5th percentile and worst caption."""
    tallest = max(min(len(rows), MAX_ROWS) for rows in groups.values())
    figure, axes = plt.subplots(
        1, len(groups), figsize=(5.0 * len(groups), 0.24 * tallest + 1.5), layout="constrained", sharex=True, squeeze=False
    )
    for axis, (budget, rows) in zip(axes[0], groups.items(), strict=True):
        shown = rows[:MAX_ROWS]
        places = np.arange(len(shown))[::-1]
        for place, (_, colour, row) in zip(places, shown, strict=True):
            psnr = np.array(row["psnr"])
            mean, low, worst = psnr.mean(), np.percentile(psnr, 5, method="lower"), psnr.min()
            axis.plot([worst, mean], [place, place], color=colour, lw=1, alpha=0.5)
            axis.errorbar(mean, place, xerr=psnr.std(ddof=1) / len(psnr) ** 0.5, color=colour, marker="o", ms=5, capsize=2)
            axis.plot(low, place, marker="|", color=colour, ms=9, mew=2)
            axis.plot(worst, place, marker="x", color=colour, ms=5)
        axis.set_yticks(places, [label for label, *_ in shown], fontsize=8)
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.set_title(f"{budget} computed steps, at most", fontsize=9)
        axis.set_xlabel("PSNR dB against the uncached run")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\ndot: mean, bar: 5th percentile, cross: worst caption", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
