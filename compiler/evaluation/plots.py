"""The plots of a report, as SVG: quality against time, error by step, schedules, coefficients.

Shapes: ``T`` steps, ``S`` slots, ``R`` forecast or moved steps, ``K`` computed steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from cachec.compiler.evaluation.error_by_step import ErrorCurve, position
from cachec.compiler.evaluation.svg import FAINT, FONT, GRID, INK, Axis, Svg, diverging, spread, text_width, tick_text
from cachec.runtime.program import Advance, Compute, Forecast, Program
from cachec.runtime.specs import Array

WIDTH = 800  # pixels of every plot; the page scales them
COMPUTED, IDLE = "#1b4f8f", "#dfe5ee"
PALETTES = {
    "level": ("#0b3d91", "#2f7ed8", "#56b4e9", "#004d66"),
    "method": ("#c8324a", "#e07a1f", "#9a4fb0", "#b8860b", "#7a4a2b", "#d6659f"),
    "solver": ("#1f7a5c", "#6a9a23", "#0f8b8d", "#6b7280"),
}
DASHES = {"level": "", "method": "", "solver": "6 3"}


@dataclass(frozen=True)
class Style:
    """How a row looks in every plot."""

    colour: str
    dash: str
    width: float


def row_styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A colour for each level, method and solver: blues, warm ones, and dashed greens."""
    colours = {kind: cycle(palette) for kind, palette in PALETTES.items()}
    return {
        row["name"]: Style(next(colours[row["kind"]]), DASHES[row["kind"]], 2.6 if row["kind"] == "level" else 1.6)
        for row in rows
        if row["kind"] in PALETTES
    }


def plot_quality(rows: Sequence[Mapping[str, Any]]) -> str:
    """PSNR in dB against seconds of the loop, with the standard error; the uncached run is a line, as its PSNR is infinite."""
    styles = row_styles(rows)
    points = [row for row in rows if row["name"] in styles and row["psnr_db"] is not None]
    points.sort(key=lambda row: (row["kind"] != "level", -row["psnr_db"]))  # levels get the best places for their names
    uncached = next(row["seconds_loop"] for row in rows if row["kind"] == "uncached")
    picture = Svg(WIDTH, 420, "PSNR against seconds of the denoise loop")
    seconds = [uncached, *(row["seconds_loop"] for row in points)]
    errors = [row["psnr_db_stderr"] or 0.0 for row in points]
    decibels = [row["psnr_db"] + side * e for row, e in zip(points, errors, strict=True) for side in (-1, 1)] or [0.0]
    margin = max(1.0, 0.06 * (max(decibels) - min(decibels)))
    x = Axis(0, 1.08 * max(seconds), 66, WIDTH - 16)
    y = Axis(min(decibels) - margin, max(decibels) + margin, 370, 16)
    picture.frame(x, y, x_label="seconds of the denoise loop (median)", y_label="PSNR dB against the uncached run")
    picture.line([(x(uncached), y.start), (x(uncached), y.end)], colour=INK, dash="2 4")
    picture.text(x(uncached) - 6, y.end + 10, f"uncached, {uncached:.3g} s", anchor="end", colour=FAINT)
    spots = [(x(row["seconds_loop"]), y(row["psnr_db"])) for row in points]
    for row, (px, _), error in zip(points, spots, errors, strict=True):
        picture.line([(px, y(row["psnr_db"] - error)), (px, y(row["psnr_db"] + error))], colour=styles[row["name"]].colour)
    for row, (px, py), place in zip(
        points, spots, place_labels([r["name"] for r in points], spots, y.end, y.start), strict=True
    ):
        colour = styles[row["name"]].colour
        picture.line([(px, py), (place[0] - 3, place[1])], colour=colour, width=0.7)
        picture.circle(px, py, 5 if row["kind"] == "level" else 4, fill=colour)
        picture.text(*place, row["name"], colour=colour, bold=row["kind"] == "level")
    return picture.render()


def place_labels(
    names: Sequence[str], spots: Sequence[tuple[float, float]], top: float, bottom: float
) -> list[tuple[float, float]]:
    """A place for each name, right of its spot and as near as possible, so that names cover neither each other nor spots.

    The first names get the nearest places. A name that fits nowhere covers others.
    """
    boxes = [(px - 7, py - 7, px + 7, py + 7) for px, py in spots]
    places: list[tuple[float, float]] = []
    moves = [(dx, sign * dy) for dx in (12, 30, 60, 100, 150) for dy in range(0, 90, 4) for sign in (1, -1)]
    for name, (px, py) in zip(names, spots, strict=True):
        for dx, dy in sorted(moves, key=lambda move: math.hypot(*move)):
            box = (px + dx - 3, py + dy - 8, px + dx + text_width(name), py + dy + 8)
            inside = box[2] < WIDTH and box[1] > top and box[3] < bottom
            if inside and not any(_overlap(box, other) for other in boxes):
                break
        places.append((px + dx, py + dy))
        boxes.append(box)
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plot_errors(errors: Mapping[str, ErrorCurve], rows: Sequence[Mapping[str, Any]], num_steps: int) -> str:
    """Relative L2 distance from the uncached latents by step, logarithmic; four decades at most."""
    styles = {name: style for name, style in row_styles(rows).items() if name in errors}
    values = [value for name in styles for value in errors[name].rel_l2 if value > 0]
    picture = Svg(WIDTH, 420, "Distance from the uncached latents by step")
    high = 10.0 ** math.ceil(math.log10(max(values, default=1.0)))
    low = max(high / 1e4, 10.0 ** math.floor(math.log10(min(values, default=0.1))))
    x = Axis(0, num_steps, 66, WIDTH - 26 - max((text_width(name) for name in styles), default=0))
    y = Axis(low, high, 370, 16, log=True)
    picture.frame(x, y, x_label="step of the uncached run", y_label="relative L2 distance of the latents")
    ends = []
    for name, style in styles.items():
        curve = errors[name]
        points = [(x(s), y(max(v, low))) for s, v in zip(curve.steps, curve.rel_l2, strict=True) if v >= low]
        picture.line(points, colour=style.colour, width=style.width, dash=style.dash)
        for px, py in points if len(points) <= 12 else ():
            picture.circle(px, py, 3, fill=style.colour)
        ends.append((points[-1][1] if points else y.start, name))
    ends.sort()
    for (end, name), place in zip(ends, spread([end for end, _ in ends], FONT + 3, 16, 370), strict=True):
        style = styles[name]
        picture.line([(x.end + 2, end), (x.end + 12, place)], colour=style.colour, width=0.8)
        picture.text(x.end + 15, place, name, colour=style.colour, bold=style.width > 2)
    return picture.render()


def plot_schedules(programs: Mapping[str, Program], grid: Array) -> str:
    """A strip per schedule over the steps of the uncached run, whose noise levels are ``grid`` [T + 1]."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, program in programs.items():
        groups.setdefault(tuple(position(grid, program.sigmas[step]) for step in program.compute_steps), []).append(name)
    height, num_steps = 34, len(grid) - 1
    picture = Svg(WIDTH, len(groups) * (height + 12) + 30, "Which steps are computed")
    x = Axis(0, num_steps, 16, WIDTH - 16)
    for index, (places, names) in enumerate(groups.items()):
        top = index * (height + 12)
        program = programs[names[0]]
        picture.text(16, top + 8, ", ".join(names), bold=True)
        count = (
            f"{len(places)} computed" if program.num_steps == num_steps else f"{len(places)} computed, on its own time steps"
        )
        picture.text(WIDTH - 16, top + 8, count, anchor="end", colour=FAINT)
        picture.rect(x.start, top + 19, x.end - x.start, height - 17, fill=IDLE)
        for place, step in zip(places, program.compute_steps, strict=True):
            width = min(1.0, position(grid, program.sigmas[step + 1]) - place)
            picture.rect(x(place), top + 19, x(width) - x(0) - 1, height - 17, fill=COMPUTED, hint=f"step {place:g}")
    for value in x.ticks():
        picture.text(x(value), len(groups) * (height + 12) + 2, tick_text(value), anchor="middle", colour=FAINT)
    picture.text(WIDTH / 2, len(groups) * (height + 12) + 20, "step of the uncached run", anchor="middle", colour=FAINT)
    return picture.render()


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The numbers of a program by step: ``values`` [R, K] of ``steps`` [R] over computed ``sources`` [K]; NaN if not read."""

    steps: tuple[int, ...]
    sources: tuple[int, ...]
    values: Array


def coefficients_of(program: Program) -> Coefficients:
    """The coefficients by the steps that they weigh, instead of by the slots that hold these."""
    sources, owner = program.compute_steps, dict[int, int]()
    steps: list[int] = []
    rows: list[Array] = []
    for instruction in program.instructions:
        if isinstance(instruction, Compute) and instruction.slot is not None:
            owner[instruction.slot] = sources.index(instruction.step)
        if isinstance(instruction, Forecast | Advance):
            read = list(range(instruction.num_slots))
            for step in instruction.steps if isinstance(instruction, Forecast) else instruction.steps[:1]:
                row = np.full(len(sources), np.nan)
                row[[owner[slot] for slot in read]] = program.coefficients[step, read]
                steps.append(step)
                rows.append(row)
    return Coefficients(tuple(steps), sources, np.array(rows).reshape(len(steps), len(sources)))


def plot_coefficients(program: Program) -> str:
    """A heat map: a column per forecast (or, on the output cut, per move), a row per computed step that it weighs."""
    found = coefficients_of(program)
    if not found.steps:
        return ""
    limit = max(float(np.nanmax(np.abs(found.values))), 1e-9)
    cell = min(22.0, 320 / len(found.sources))
    bottom = 8 + cell * len(found.sources)
    picture = Svg(WIDTH, bottom + 84, "Coefficients")
    x = Axis(0, len(found.steps), 66, WIDTH - 16)
    width = (x.end - x.start) / len(found.steps)
    for row, source in enumerate(found.sources):
        if cell >= 10 or row % math.ceil(10 / cell) == 0:
            picture.text(60, 8 + cell * (row + 0.5), str(source), anchor="end", colour=FAINT)
        for column, step in enumerate(found.steps):
            value = found.values[column, row]
            if math.isnan(value):
                continue
            hint = f"step {step}: {value:+.4f} of step {source}"
            picture.rect(x(column), 8 + cell * row, width - 0.6, cell - 0.6, fill=diverging(value / limit), hint=hint)
    every = math.ceil(26 / width)
    for column in range(0, len(found.steps), every):
        picture.text(x(column + 0.5), bottom + 12, str(found.steps[column]), anchor="middle", colour=FAINT)
    what = "forecast step" if program.cut == "hidden" else "computed step, from which the latents move on"
    picture.text((x.start + x.end) / 2, bottom + 31, what, anchor="middle")
    picture.text(18, 8 + cell * len(found.sources) / 2, "weight of step", anchor="middle", turn=True)
    _draw_legend(picture, limit, bottom + 56)
    return picture.render()


def _draw_legend(picture: Svg, limit: float, top: float) -> None:
    left, cells = WIDTH - 16 - 62 - 240, 48
    for index in range(cells):
        value = 2 * index / (cells - 1) - 1
        picture.rect(left + 5 * index, top, 5.3, 12, fill=diverging(value))
    picture.text(left - 6, top + 6, f"{-limit:.2g}", anchor="end", colour=FAINT)
    picture.text(left + 246, top + 6, f"{limit:.2g}", colour=FAINT)
    picture.text(left + 120, top + 21, "0", anchor="middle", colour=FAINT)
    picture.line([(left + 120, top + 11), (left + 120, top + 15)], colour=GRID)
