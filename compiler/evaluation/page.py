"""The report as one self-contained HTML page: pictures and plots inside, no script, nothing loaded from elsewhere."""

import base64
import importlib.util
import math
from importlib.resources import files
from typing import Any

from PIL import Image

from cachec.compiler.evaluation.bench import KeptPrompt, Shown
from cachec.compiler.evaluation.evaluate import Evaluation
from cachec.compiler.evaluation.pictures import some_frames, to_image
from cachec.compiler.evaluation.plots import plot_coefficients, plot_errors, plot_quality, plot_schedules
from cachec.compiler.evaluation.words import HEADER, MEANINGS, Report, decibels, headline, table_cells, table_notes
from cachec.compiler.planning.goals import DIFFUSERS
from cachec.pictures.files import png_of
from cachec.runtime.errors import missing_extra
from cachec.runtime.program import UNCACHED
from cachec.runtime.specs import Array

if importlib.util.find_spec("jinja2") is None:
    raise missing_extra("jinja2", "compile", "writing reports")
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

MAX_SIDE = 512  # pixels; larger pictures are reduced


def render_page(report: Report) -> str:
    """The page; everything that people wrote (prompts, names) is escaped."""
    template = files("cachec.compiler.evaluation").joinpath("templates/report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    evaluation = report.evaluation
    rows, programs = evaluation.rows, evaluation.programs
    grid = programs[UNCACHED].sigmas
    levels = [row["name"] for row in rows if row["kind"] == "level"]
    maps = [(name, plot_coefficients(name, programs[name])) for name in levels]
    return page.render(
        title=f"{report.name}: {headline(report)}",
        subtitle=f"{report.name}, method {evaluation.setting['method']}",
        headline=headline(report),
        figures=_figures(report),
        prompts=[_prompt(kept, evaluation) for kept in evaluation.kept],
        header=[name.replace(" ", "\u00a0") if len(name) < 12 else name for name in HEADER],
        table=[{"cells": table_cells(row), "own": row["kind"] == "level"} for row in rows],
        notes=table_notes(evaluation),
        quality=Markup(plot_quality(rows)),
        errors=Markup(plot_errors(evaluation.errors, rows, len(grid) - 1)) if evaluation.errors else "",
        schedules=Markup(plot_schedules({n: p for n, p in programs.items() if n != UNCACHED}, grid)),
        heat_maps=[(name, Markup(drawn)) for name, drawn in maps if drawn],
        facts=[*report.facts, *report.environment],
        meanings=MEANINGS,
    )


def _figures(report: Report) -> list[tuple[str, str]]:
    row = report.headline_row
    uncached = next(row for row in report.evaluation.rows if row["kind"] == "uncached")
    accuracy = row["attribute_accuracy"]
    figures = [
        ("denoise loop", f"{row['seconds_loop']:.3g} s"),
        ("uncached loop", f"{uncached['seconds_loop']:.3g} s"),
        ("PSNR, mean", decibels(row["psnr_db"])),
        ("5th percentile", decibels(row["psnr_db_p5"])),
        ("worst prompt", decibels(row["psnr_db_min"])),
        (f"PSNR vs {report.evaluation.setting['fine_steps']} steps", decibels(row["psnr_db_fine"])),
    ]
    return figures if accuracy is None else [*figures, ("attributes right", f"{accuracy:.1%}")]


def _prompt(kept: KeptPrompt, evaluation: Evaluation) -> dict[str, Any]:
    own = {row["name"] for row in evaluation.rows if row["kind"] == "level"}
    names = [UNCACHED, *(name for name in kept.rows if name not in (UNCACHED, DIFFUSERS)), DIFFUSERS]
    cells = [_cell(name, kept.rows[name], own=name in own) for name in names]
    return {"text": kept.prompt, "cells": [*cells, _cell(f"{evaluation.setting['fine_steps']} steps", kept.fine, own=False)]}


def _cell(name: str, shown: Shown, *, own: bool) -> dict[str, Any]:
    return {
        "name": name,
        "psnr": f"{shown.psnr_db:.1f} dB" if math.isfinite(shown.psnr_db) else ("reference" if name == UNCACHED else "equal"),
        "seconds": f"{shown.seconds:.3g} s",
        "png": encode_png(shown.picture),
        "own": own,
    }


def encode_png(picture: Array, side: int = MAX_SIDE) -> str:
    """Base64 of a picture [H, W, 3] as PNG, of a video animated with some of its frames, reduced to ``side`` pixels."""
    images = [to_image(frame) for frame in some_frames(picture)]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return base64.b64encode(png_of(images)).decode()
