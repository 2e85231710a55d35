"""The serving bench's chart: goodput, throughput and latencies against the arrival rate, a line a system."""

from pathlib import Path

import matplotlib as mpl

from bench.serving_loads import bounded, good

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, StrMethodFormatter

COLOURS = {
    "lanes": "#1f77b4",
    "one at a time": "#2ca02c",
    "whole requests": "#b8860b",
    "lanes uncached": "#d62728",
    "diffusers eager": "#8c8c8c",
}


def draw(data, file: Path):
    """Loads of mixed levels of the five systems; a hollow mark is a percentile that is known from below."""
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.6), layout="constrained", sharex=True)
    idle, most = data["systems"]["lanes"]["idle"], 0.0
    for system, colour in COLOURS.items():
        loads = full_loads(data, system)
        if not loads:
            continue
        rates, style = [one["rate"] for one in loads], {"color": colour, "marker": "o", "markersize": 4, "label": system}
        most = max(most, *rates)
        axes[0, 0].plot(rates, [good(one, idle) for one in loads], **style)
        axes[0, 1].plot(rates, [one["throughput"] for one in loads], **style)
        for axis, percent in zip((axes[1, 0], axes[1, 1], axes[1, 2]), (50, 95, 99), strict=True):
            values = [bounded(one, percent) for one in loads]
            axis.plot(rates, [value for value, _ in values], color=colour, linewidth=1.2)
            for rate, (value, is_open) in zip(rates, values, strict=True):
                axis.plot(rate, value, marker="^" if is_open else "o", color=colour, markersize=6 if is_open else 4,
                          markerfacecolor="white" if is_open else colour)  # fmt: skip
    for axis, title in ((axes[0, 0], "goodput, requests/s"), (axes[0, 1], "throughput, requests/s")):
        axis.plot([0, most], [0, most], color="black", linewidth=0.7, linestyle=":")
        axis.set(title=title, ylim=(0, None), xlim=(0, 1.05 * most))
    for axis, percent in zip(axes[1], (50, 95, 99), strict=True):
        axis.set(title=f"p{percent} latency, s", yscale="log", xlabel="arrivals/s")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes[0, 2].axis("off")
    axes[0, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left", frameon=False, title=data["model"])
    axes[0, 2].text(0.02, 0.04, "dotted: all that arrive\nhollow triangle: at least this much,\nas the load was cut off",
                    fontsize=8, transform=axes[0, 2].transAxes)  # fmt: skip
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def full_loads(data, system):
    """Those of mixed levels with as many requests as the longest, by rate."""
    loads = data["systems"].get(system, {}).get("loads", {}).values()
    mixed = [one for one in loads if one["mix"] == "mixed"]
    most = max((one["count"] for one in mixed), default=0)
    return sorted((one for one in mixed if one["count"] == most), key=lambda one: one["rate"])
