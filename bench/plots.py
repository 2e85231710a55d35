"""Plots of the speed bench, from its JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "diffusers": "#8c8c8c",
    "torch.compile": "#b8860b",
    "cachec ort": "#1f77b4",
    "cachec aoti": "#2ca02c",
    "cachec inductor": "#9467bd",
}


def draw_plots(data: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Draw what has been measured into ``out``; file names by plot."""
    drawings = {"rows-tiny-flux": draw_rows, "rows-flux-shaped": draw_rows, "tokens": draw_tokens, "steps": draw_steps,
                "batch": draw_batch}  # fmt: skip
    files = {}
    for name, draw in drawings.items():
        if name in data["parts"]:
            figure = draw(data["parts"][name])
            files[name] = f"speed-{name}.png"
            figure.savefig(out / files[name], dpi=110)
            plt.close(figure)
    return files


def draw_rows(part: Mapping[str, Any]) -> Any:
    """Seconds of the loop, a bar a row, with its PSNR."""
    rows = [row for row in part["rows"] if not row["name"].startswith("cachec") or " on the steps of " not in row["name"]]
    figure, axes = plt.subplots(figsize=(8.5, 0.27 * len(rows) + 1.2), layout="constrained")
    places = np.arange(len(rows))[::-1]
    seconds = [row["seconds"]["median"] for row in rows]
    axes.barh(places, seconds, color=[COLOURS[row["family"]] for row in rows], height=0.72)
    for place, row, value in zip(places, rows, seconds, strict=True):
        note = f"{'all ' if len(row['computed']) == part['steps'] else ''}{len(row['computed'])} steps"
        quality = "" if row["psnr_db"] is None else f", {row['psnr_db']:.0f} dB"
        axes.text(value + 0.01 * max(seconds), place, f"{value:.3g} s, {note}{quality}", va="center", fontsize=8)
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    axes.set_xlim(right=max(seconds) * 1.3)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"seconds of the denoise loop, {part['case']}, {part['steps']} steps")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_tokens(part: Mapping[str, Any]) -> Any:
    """One step by image tokens."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    lines = {"diffusers": "diffusers, a step", "torch.compile": "torch.compile, a step", "ort": "cachec ort, a computed step",
             "forecast run": f"cachec ort, {part['forecasts']} forecasts in one call"}  # fmt: skip
    colours = {"ort": COLOURS["cachec ort"], "forecast run": "#d62728"}
    tokens = [row["tokens"] for row in part["rows"]]
    for key, label in lines.items():
        values = [1e3 * row[key]["median"] for row in part["rows"]]
        axes.plot(tokens, values, "o-", color=colours.get(key, COLOURS.get(key)), label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(number) for number in tokens])
    axes.set_xlabel("image tokens")
    axes.set_ylabel("milliseconds")
    return _finish(figure, axes)


def draw_steps(part: Mapping[str, Any]) -> Any:
    """The loop by computed steps; a dashed line from nothing to the uncached run."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for cut, colour in (("hidden", COLOURS["cachec ort"]), ("output", "#d62728")):
        rows = [row for row in part["rows"] if row["cut"] == cut]
        budgets, medians = [row["budget"] for row in rows], np.array([row["median"] for row in rows])
        errors = np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - medians)
        axes.errorbar(budgets, medians, errors, fmt="o-", color=colour, capsize=2, label=f"{cut} cut")
    whole = max(part["rows"], key=lambda row: row["budget"])
    axes.plot([0, whole["budget"]], [0, whole["median"]], "--", color="#8c8c8c", label="ideal: K/T of the uncached run")
    axes.set_xlabel("computed steps")
    axes.set_ylabel("seconds of the loop, cachec ort")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes)


def draw_batch(part: Mapping[str, Any]) -> Any:
    """Seconds per picture by batch."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in part["rows"]))
    for name, colour in zip(names, (COLOURS["diffusers"], COLOURS["cachec ort"]), strict=True):
        rows = [row for row in part["rows"] if row["name"] == name]
        axes.plot(
            [row["batch"] for row in rows], [row["median"] / row["batch"] for row in rows], "o-", color=colour, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["batch"] for row in part["rows"]}), sorted({row["batch"] for row in part["rows"]}))
    axes.set_xlabel("batch")
    axes.set_ylabel("seconds of the loop per picture, cachec ort")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes)


def _finish(figure: Any, axes: Any) -> Any:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
