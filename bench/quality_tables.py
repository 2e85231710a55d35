"""Figures and tables of ``bench/QUALITY.md``, from rows with one value a caption.

Shapes: ``P`` captions.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cachec.runtime.device import CPU
from cachec.runtime.specs import Array

Row = Mapping[str, Any]
ROUNDS = 2000  # bootstraps
SURE = 2.0  # standard errors, for a sentence that says which of two is better


class Found:
    """The rows of a model."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.facts: Mapping[str, Any] = content["facts"]
        self._rows: Mapping[str, dict[str, Any]] = content["rows"]
        self.name, self.steps = str(self.facts["model"]), int(self.facts["steps"])
        self.seconds = sum(row["seconds"] for row in self._rows.values())
        self.devices = Counter(str(row.get("device", CPU)) for row in self._rows.values())

    def get(self, part: str, budget: int | str, method: str, schedule: str) -> dict[str, Any] | None:
        row = self._rows.get("|".join((part, str(budget), method, schedule)))
        return None if row is None or "missing" in row else row

    def of_part(self, part: str) -> list[tuple[int, str, str, dict[str, Any]]]:
        """Budget, method, schedule and row of all that is measured of a part."""
        return [(int(key[1]), key[2], key[3], row) for key, row in self._split() if key[0] == part and "missing" not in row]

    def of(self, part: str, budget: int) -> list[tuple[str, str, dict[str, Any]]]:
        return [(name, schedule, row) for own, name, schedule, row in self.of_part(part) if own == budget]

    def missing(self, part: str) -> list[tuple[str, str]]:
        """What could not be measured, and why."""
        return [(", ".join(key[1:]), row["missing"]) for key, row in self._split() if key[0] == part and "missing" in row]

    def _split(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        for key, row in self._rows.items():
            yield key.split("|"), row


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def low(values: Array) -> Array:
    """5th percentile along the last axis, a value that occurred."""
    result: Array = np.percentile(values, 5, axis=-1, method="lower")
    return result


def high(values: Array) -> Array:
    """95th percentile along the last axis, a value that occurred."""
    result: Array = np.percentile(values, 95, axis=-1, method="higher")
    return result


def least(values: Array) -> Array:
    result: Array = np.min(values, axis=-1)
    return result


def average(values: Array) -> Array:
    result: Array = np.mean(values, axis=-1)
    return result


def bootstrap(num: int) -> Array:
    """Captions [ROUNDS, P] drawn anew, the same ones for all rows of so many captions."""
    return np.random.default_rng(0).integers(num, size=(ROUNDS, num))


MEASURES = {  # name: values of a row, what is made of them, +1 if more is better, digits, unit
    "mean PSNR": ("psnr", average, 1, 2),
    "p5 of PSNR": ("psnr", low, 1, 1),
    "worst PSNR": ("psnr", least, 1, 1),
    "mean SSIM": ("ssim", average, 1, 5),
    "mean latent error": ("latent", average, -1, 5),
    "p95 of latent error": ("latent", high, -1, 5),
}


def interval(values: Array, draws: Array, statistic: Any) -> tuple[float, float]:
    """95 % of the bootstraps of a statistic of values [P]."""
    ends = np.percentile(statistic(values[draws]), [2.5, 97.5])
    return float(ends[0]), float(ends[1])


def spread(values: Array, statistic: Any) -> str:
    """A statistic of PSNR [P], and its bootstrap interval."""
    lower, upper = interval(values, bootstrap(len(values)), statistic)
    return f"{statistic(values):.1f} [{lower:.1f}, {upper:.1f}]"


def cells(row: Row) -> list[str]:
    """PSNR, its tail, SSIM, and latent errors."""
    psnr, latent = np.array(row["psnr"]), np.array(row["latent"])
    return [
        f"{psnr.mean():.2f} ± {psnr.std(ddof=1) / len(psnr) ** 0.5:.2f}",
        spread(psnr, low), spread(psnr, least),
        f"{np.mean(row['ssim']):.5f}", f"{latent.mean():.5f}", f"{high(latent):.5f}",
    ]  # fmt: skip


def cost(row: Row) -> str:
    """How many steps are computed; of rules that decide as they go, on average, and from which to which."""
    if "computed_range" not in row:
        return str(row["computed"])
    least_steps, most = row["computed_range"]
    return f"{row['computed']:.1f} ({least_steps} to {most})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    change = np.array(ours) - np.array(theirs)
    return f"{change.mean():+.2f} ± {change.std(ddof=1) / len(change) ** 0.5:.2f}"


def verdict(ours: Row, theirs: Row) -> str:
    """Which of two rows is better by the mean, as far as the paired difference says so."""
    change = np.array(ours["psnr"]) - np.array(theirs["psnr"])
    error = change.std(ddof=1) / len(change) ** 0.5
    if abs(change.mean()) < SURE * error:
        return f"within {SURE:g} standard errors, so neither is shown to be better"
    return "it is better" if change.mean() > 0 else "it is worse"


def difference(ours: Row, theirs: Row, measure: str) -> tuple[str, str]:
    """Ours minus theirs, with its spread, and whether ours is better: ``yes``, ``no``, or ``open`` if that is not shown."""
    key, statistic, sign, digits = MEASURES[measure]
    a, b = np.array(ours[key]), np.array(theirs[key])
    change = float(statistic(a) - statistic(b))
    if statistic is average:
        error = float((a - b).std(ddof=1) / len(a) ** 0.5)
        return f"{change:+.{digits}f} ± {error:.{digits}f}", _shown(
            sign * change, sign * change - SURE * error, sign * change + SURE * error
        )
    draws = bootstrap(len(a))
    ends = np.percentile(statistic(a[draws]) - statistic(b[draws]), [2.5, 97.5])
    lower, upper = (float(one) for one in ends)
    told = f"{change:+.{digits}f} [{lower:+.{digits}f}, {upper:+.{digits}f}]"
    return told, _shown(sign * change, *sorted((sign * lower, sign * upper)))


def _shown(change: float, lower: float, upper: float) -> str:
    if lower > 0:
        return "better"
    return "worse" if upper < 0 else f"{'better' if change > 0 else 'worse'}, not shown"


def compared(ours: Row, others: Sequence[tuple[str, str, Row]], measure: str) -> list[str]:
    """Cells: the measure, the best other row by it, its value, ours, the difference, and what it shows."""
    key, statistic, sign, digits = MEASURES[measure]
    name, steps, best = max(others, key=lambda one: sign * float(statistic(np.array(one[2][key]))))
    values = [float(statistic(np.array(row[key]))) for row in (best, ours)]
    return [measure, f"{name}, {steps}", *(f"{value:.{digits}f}" for value in values), *difference(ours, best, measure)]


def ablation(path: Path) -> str:
    """Variants of the closed form of ``gram``, and calibration on other captions, from ``bench/gram_ablation.json``."""
    data = json.loads(path.read_text(encoding="utf-8"))
    variants, lines = data["variants"], []
    for name in next(iter(variants.values())):
        found = []
        for entry in variants.values():
            row = entry.get(name)
            first = name == "closed form"
            found.append("–" if row is None else f"{row['db']:.2f}" if first else f"{row['change']:+.2f} ± {row['stderr']:.2f}")
        lines.append([name, *found])
    captions = data["captions"]
    told = (
        f"Calibrated on {data['num_fit']} captions {data['same']}: {captions['same']['db']:.2f} dB. On as many "
        f"{data['disjoint']}: {captions['disjoint']['db']:.2f} dB, {captions['disjoint']['change']:+.2f} ± "
        f"{captions['disjoint']['stderr']:.2f} (latents, 8 steps, closed form, other captions {data['same']}).\n"
    )
    head = (
        f"\n## What helps `gram`, on {data['model']}\n\nRelative L2 error of the final latents in dB on prompts that no "
        "fit saw, "
        "and paired changes from the closed form (`python -m bench.gram_ablation`); the searched steps of the tables above.\n\n"
    )
    return head + table(["variant", *(f"K = {k}" for k in variants)], lines) + "\n\n" + told
