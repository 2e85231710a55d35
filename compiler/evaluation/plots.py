"""The plots of a report, as SVG: quality against time, error by step, schedules, coefficients.

Shapes: ``T`` steps, ``G`` groups, ``R`` forecast or moved steps, ``K`` computed steps.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from cachec.compiler.evaluation.drawing import DPI, FAINT, FONT_SIZE, INK, Caption, add_axes, draw, text_width
from cachec.compiler.evaluation.error_by_step import ErrorCurve, position
from cachec.runtime.abi import BRANCHES
from cachec.runtime.program import KEPT, Program
from cachec.runtime.specs import Array

WIDTH = 960  # pixels of every plot; the page scales them
STRIP = 48  # pixels a schedule takes
PANEL, LEGEND = 56, 44  # pixels under a heat map, and under all of them
COMPUTED, IDLE = "#1b4f8f", "#dfe5ee"
PALETTES = {
    "level": ("#0b3d91", "#2f7ed8", "#56b4e9", "#004d66"),
    "method": ("#c8324a", "#e07a1f", "#9a4fb0", "#b8860b", "#7a4a2b", "#d6659f"),
    "solver": ("#1f7a5c", "#6a9a23", "#0f8b8d", "#6b7280"),
}
DASHES = {"level": "-", "method": "-", "solver": (0, (4, 2))}
WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"])
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Style:
    """How a row looks in every plot."""

    colour: str
    dash: Any
    width: float

    @property
    def weight(self) -> str:
        return "bold" if self.width > 2 else "normal"


def row_styles(rows: Rows) -> dict[str, Style]:
    """A colour for each level, method and solver: blues, warm ones, and dashed greens."""
    colours = {kind: cycle(palette) for kind, palette in PALETTES.items()}
    return {
        row["name"]: Style(next(colours[row["kind"]]), DASHES[row["kind"]], 2.6 if row["kind"] == "level" else 1.6)
        for row in rows
        if row["kind"] in PALETTES
    }


def plot_quality(rows: Rows) -> str:
    """PSNR in dB against seconds of the loop: mean, standard error and 5th percentile.

    The uncached run is a line, as its PSNR is infinite.
    """
    points = [row for row in rows if row["kind"] in PALETTES and row["psnr_db"] is not None]
    points.sort(key=lambda row: (row["kind"] != "level", -row["psnr_db"]))  # levels get the best places for their names
    said = [f"{row['name']} {row['psnr_db']:.1f} dB in {row['seconds_loop']:.3g} s" for row in points]
    caption = Caption(
        "quality", "PSNR against seconds of the denoise loop", "; ".join(said) or "no row differs from the uncached run"
    )
    return draw(caption, WIDTH, 440, partial(_paint_quality, points, rows))


def _paint_quality(points: Rows, rows: Rows, figure: Figure) -> dict[str, str]:
    styles, axes = row_styles(rows), add_axes(figure, left=66, top=12, right=16, bottom=50)
    uncached = next(row["seconds_loop"] for row in rows if row["kind"] == "uncached")
    axes.set(xlabel="seconds of the denoise loop (median)", ylabel="PSNR dB against the uncached run")
    axes.axvline(uncached, color=INK, linewidth=1, linestyle=(0, (2, 4)))
    for row in points:
        error, colour = row["psnr_db_stderr"] or 0.0, styles[row["name"]].colour
        x, y, size = row["seconds_loop"], row["psnr_db"], 10 if row["kind"] == "level" else 8
        low = y if row["psnr_db_p5"] is None else row["psnr_db_p5"]  # none where most pictures are equal
        axes.plot([x, x], [low, y], color=colour, linewidth=0.8, marker="_", markevery=[0])
        axes.plot([x, x], [y - error, y + error], color=colour, linewidth=4, alpha=0.4, solid_capstyle="butt")
        axes.plot([x], [y], "o", color=colour, markersize=size, markeredgecolor="white", gid=f"spot {row['name']}")
    _set_seconds(axes, [uncached, *(row["seconds_loop"] for row in points)])
    low, high = axes.get_ylim() if points else (0.0, 1.0)
    axes.set_ylim(low, max(high, low + 2.0))  # tenths of a decibel do not fill the plot
    _name_spots(axes, points, styles)
    axes.annotate(f"uncached, {uncached:.3g} s", (uncached, axes.get_ylim()[1]), (-6, -2), textcoords="offset pixels",
                  color=FAINT, ha="right", va="top")  # fmt: skip
    return {f"spot {row['name']}": _quality_hint(row) for row in points}


def _set_seconds(axes: Axes, seconds: Sequence[float]) -> None:
    """A logarithmic axis, as ratios are what counts; it has a tick at least, however near the values are."""
    axes.set(xscale="log", xlim=(min(seconds) / 1.25, max(seconds) * 1.25))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _quality_hint(row: Mapping[str, Any]) -> str:
    tail = "" if row["psnr_db_p5"] is None else f" (5th percentile {row['psnr_db_p5']:.1f}, worst {row['psnr_db_min']:.1f})"
    return f"{row['name']}: {row['psnr_db']:.2f} dB{tail} in {row['seconds_loop']:.3g} s"


def _name_spots(axes: Axes, points: Rows, styles: Mapping[str, Style]) -> None:
    """Names beside the spots, with a line to them."""
    inside, boxes = axes.get_window_extent(), []
    spots = [tuple(axes.transData.transform((row["seconds_loop"], row["psnr_db"]))) for row in points]
    for row, (x, y) in zip(points, spots, strict=True):
        bar = axes.transData.transform((row["seconds_loop"], row["psnr_db"] + (row["psnr_db_stderr"] or 0.0)))[1] - y
        boxes.append((x - 7, y - max(bar, 7), x + 7, y + max(bar, 7)))
    widths = [text_width(row["name"]) for row in points]
    for row, (x, y), place in zip(points, spots, place_labels(widths, boxes, (inside.y0, inside.y1), right=WIDTH), strict=True):
        look = styles[row["name"]]
        arrow = {"arrowstyle": "-", "color": look.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(row["name"], (x, y), place, "figure pixels", "figure pixels", arrow,
                      color=look.colour, weight=look.weight, va="center_baseline")  # fmt: skip


Box = tuple[float, float, float, float]  # left, low, right and high edge in pixels


def place_labels(
    widths: Sequence[float], marks: Sequence[Box], inside: tuple[float, float], right: float
) -> list[tuple[float, float]]:
    """Where each text begins, in pixels: right of the centre of its mark and near, covering neither another nor a mark.

    Texts stay between the heights ``inside`` and left of ``right``. The first get the nearest places; one that fits nowhere
    covers others.
    """
    boxes, places = list(marks), list[tuple[float, float]]()
    moves = [(dx, sign * dy) for dx in (12, 30, 60, 100, 150) for dy in range(0, 90, 4) for sign in (1, -1)]
    for width, mark in zip(widths, marks, strict=True):
        x, y = (mark[0] + mark[2]) / 2, (mark[1] + mark[3]) / 2
        for dx, dy in sorted(moves, key=lambda move: math.hypot(*move)):
            box = (x + dx - 3, y + dy - 8, x + dx + width, y + dy + 8)
            fits = box[2] < right and inside[0] < box[1] and box[3] < inside[1]
            if fits and not any(_overlap(box, other) for other in boxes):
                break
        places.append((x + dx, y + dy))
        boxes.append(box)
    return places


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plot_errors(errors: Mapping[str, ErrorCurve], rows: Rows, num_steps: int) -> str:
    """Relative L2 distance from the uncached latents by step, logarithmic; four decades at most."""
    styles = {name: look for name, look in row_styles(rows).items() if name in errors}
    said = [f"{name} ends at {errors[name].rel_l2[-1]:.2g}" for name in styles]
    caption = Caption("errors", "Distance from the uncached latents by step", "; ".join(said))
    return draw(caption, WIDTH, 440, partial(_paint_errors, errors, styles, num_steps))


def _paint_errors(
    errors: Mapping[str, ErrorCurve], styles: Mapping[str, Style], num_steps: int, figure: Figure
) -> dict[str, str]:
    values = [value for name in styles for value in errors[name].rel_l2 if value > 0]
    high = 10.0 ** math.ceil(math.log10(max(values, default=1.0)))
    low = max(high / 1e4, 10.0 ** math.floor(math.log10(min(values, default=0.1))))
    names_width = max((text_width(name) for name in styles), default=0)
    axes = add_axes(figure, left=66, top=12, right=26 + names_width, bottom=50)
    axes.set(xlabel="step of the uncached run", ylabel="relative L2 distance of the latents", yscale="log")
    axes.set(xlim=(0, num_steps), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}")
    axes.minorticks_off()
    ends: list[tuple[float, str]] = []
    for name, look in styles.items():
        points = np.array([point for point in zip(errors[name].steps, errors[name].rel_l2, strict=True) if point[1] >= low])
        steps, heights = points.reshape(-1, 2).T
        axes.plot(steps, heights, color=look.colour, linewidth=look.width, linestyle=look.dash, clip_on=False,
                  marker="o" if len(points) <= 12 else "", markersize=5, gid=f"curve {name}")  # fmt: skip
        ends.append((float(axes.transData.transform((num_steps, heights[-1] if len(points) else low))[1]), name))
    _name_ends(axes, sorted(ends), styles)
    return {f"curve {name}": name for name in styles}


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str]], styles: Mapping[str, Style]) -> None:
    inside = axes.get_window_extent()
    places = spread([height for height, _ in ends], FONT_SIZE + 3, inside.y0, inside.y1)
    for (height, name), place in zip(ends, places, strict=True):
        look = styles[name]
        arrow = {"arrowstyle": "-", "color": look.colour, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(name, (inside.x1 + 3, height), (inside.x1 + 15, place), "figure pixels", "figure pixels", arrow,
                      annotation_clip=False, color=look.colour, weight=look.weight, va="center_baseline")  # fmt: skip


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted places apart until they are ``gap`` from each other, between ``low`` and ``high`` where they fit."""
    result: list[float] = []
    for place in places:
        result.append(max(place, result[-1] + gap if result else low))
    limit = high
    for index in reversed(range(len(result))):
        result[index] = min(result[index], limit)
        limit = result[index] - gap
    return result


def plot_schedules(programs: Mapping[str, Program], grid: Array) -> str:
    """A strip per schedule over the steps of the uncached run, whose noise levels are ``grid`` [T + 1]."""
    strips: dict[tuple[float, ...], list[str]] = {}
    for name, program in programs.items():
        strips.setdefault(tuple(position(grid, program.sigmas[step]) for step in program.compute_steps), []).append(name)
    said = [f"{', '.join(names)}: {', '.join(f'{place:g}' for place in places)}" for places, names in strips.items()]
    caption = Caption("schedules", "Which steps are computed", "; ".join(said))
    return draw(caption, WIDTH, len(strips) * STRIP + 50, partial(_paint_schedules, strips, programs, grid))


def _paint_schedules(
    strips: Mapping[tuple[float, ...], Sequence[str]], programs: Mapping[str, Program], grid: Array, figure: Figure
) -> dict[str, str]:
    num_steps, hints = len(grid) - 1, dict[str, str]()
    axes = add_axes(figure, left=16, top=0, right=16, bottom=50)
    axes.set(xlim=(0, num_steps), ylim=(len(strips) * STRIP, 0), yticks=[], xlabel="step of the uncached run")  # pixels down
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    for index, (places, names) in enumerate(strips.items()):
        program, top = programs[names[0]], index * STRIP
        own = "" if program.num_steps == num_steps else ", on its own time steps"
        axes.text(0, top + 14, ", ".join(names), weight="bold")
        axes.text(num_steps, top + 14, f"{len(places)} computed{own}", ha="right", color=FAINT)
        axes.add_patch(Rectangle((0, top + 20), num_steps, STRIP - 26, color=IDLE, linewidth=0))
        for place, step in zip(places, program.compute_steps, strict=True):
            width, gid = min(1.0, position(grid, program.sigmas[step + 1]) - place), f"step {index} {step}"
            axes.add_patch(Rectangle((place, top + 20), 0.94 * width, STRIP - 26, color=COMPUTED, linewidth=0, gid=gid))
            hints[gid] = f"step {place:.3g}"
    return hints


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The numbers of a program by step: ``values`` [G, R, K] of ``steps`` [R] over computed ``sources`` [K].

    NaN where a step is not read. ``groups``: what each is of, in words.
    """

    steps: tuple[int, ...]
    sources: tuple[int, ...]
    values: Array
    groups: tuple[str, ...]

    @property
    def limit(self) -> float:
        """The largest weight, for scales."""
        return max(float(np.nanmax(np.abs(self.values))), 1e-9)


def coefficients_of(program: Program) -> Coefficients:
    """The coefficients by the steps that they weigh, instead of by the slots that hold these."""
    sources, owner, kind = program.compute_steps, dict[int, int](), KEPT[program.cut]
    num_groups = program.coefficients.shape[1]
    steps: list[int] = []
    rows: list[Array] = []
    for instruction in program.instructions:
        for step in instruction.rows if kind in instruction.reads else ():
            read = list(instruction.reads[kind])
            row = np.full((num_groups, len(sources)), np.nan)
            row[:, [owner[slot] for slot in read]] = program.coefficients[step][:, read]
            steps.append(step)
            rows.append(row)
        if instruction.computes and kind in instruction.writes:
            owner[instruction.writes[kind][0]] = sources.index(instruction.steps[0])
    values = np.array(rows).reshape(len(steps), num_groups, len(sources)).swapaxes(0, 1)
    several = [f"{name} branch: " for name in BRANCHES] if program.has_branches else [f"group {g}: " for g in range(num_groups)]
    return Coefficients(tuple(steps), sources, values, tuple(several if num_groups > 1 else ("",)))


def plot_coefficients(name: str, program: Program) -> str:
    """Heat maps, one for each group: a column per forecast (or, on the output cut, per move), a row per step it weighs."""
    found = coefficients_of(program)
    if not found.steps:
        return ""
    what = "forecast step" if program.cut == "hidden" else "computed step, from which the latents move on"
    said = f"{len(found.steps)} rows over computed steps {list(found.sources)}, the largest weight {found.limit:.3g}"
    caption = Caption(f"coefficients-{re.sub(r'[^A-Za-z0-9.]', '-', name)}", f"Coefficients of {name}", said)
    height = min(22.0, 320 / len(found.sources)) * len(found.sources)
    whole = len(found.values) * (height + PANEL) + LEGEND
    return draw(caption, WIDTH, whole, partial(_paint_coefficients, found, what, height))


def _paint_coefficients(found: Coefficients, what: str, height: float, figure: Figure) -> dict[str, str]:
    whole, hints = figure.get_figheight() * DPI, dict[str, str]()
    for group, values in enumerate(found.values):
        top = 8 + group * (height + PANEL)
        axes = add_axes(figure, left=66, top=top, right=16, bottom=whole - top - height)
        of_group = found.groups[group]
        axes.set(xlim=(0, len(found.steps)), ylim=(len(found.sources), 0), xlabel=of_group + what, ylabel="weight of step")
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        _name_cells(axes.xaxis, found.steps, math.ceil(26 * len(found.steps) / axes.get_window_extent().width))
        _name_cells(axes.yaxis, found.sources, math.ceil(14 * len(found.sources) / height))
        for (column, row), value in np.ndenumerate(values):
            if not math.isnan(value):
                gid, colour = f"weight {group} {column} {row}", _colour(value / found.limit)
                axes.add_patch(Rectangle((column, row), 0.97, 0.97, color=colour, linewidth=0, gid=gid))
                hints[gid] = f"{of_group}step {found.steps[column]}: {value:+.4f} of step {found.sources[row]}"
    _add_legend(figure, found.limit)
    return hints


def _colour(share: float) -> Any:
    """Of a weight from -1 to 1; by a power below one, so that small weights stay visible."""
    return WEIGHTS(0.5 + 0.5 * math.copysign(abs(share) ** 0.7, share))


def _add_legend(figure: Figure, limit: float) -> None:
    axes = add_axes(figure, left=WIDTH - 272, top=figure.get_figheight() * DPI - 34, right=32, bottom=22)
    axes.set(xlim=(-1, 1), yticks=[])
    axes.set_xticks([-1, 0, 1], [f"{-limit:.2g}", "0", f"{limit:.2g}"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for left in np.arange(-1, 1, 1 / 24):
        axes.add_patch(Rectangle((left, 0), 1 / 20, 1, color=_colour(left + 1 / 48), linewidth=0))


def _name_cells(axis: Axis, names: Sequence[int], every: int) -> None:
    """Ticks in the middle of cells, as many as there is room for."""
    axis.set_ticks([index + 0.5 for index in range(0, len(names), every)], [str(name) for name in names[::every]])
