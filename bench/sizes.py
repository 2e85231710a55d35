"""Does a model of real size compile here, in what time and memory? ``make sizes``: bench/SIZES.md and sizes.json.

Pipelines of FLUX.1-dev's width with random weights (``bench/random_flux.py``), of few blocks and of all. Every row is a process
of its own; memory is the peak of its resident set. One model and one bundle are on the disk at a time: the largest row takes 48
GB. ``--only`` takes rows by name; what the page says of the others stays, with the day that it was measured on.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.random_flux import write_flux
from bench.static import BEGIN

HERE = Path(__file__).parent
BASE = {"method": "taylor", "interval": 5, "steps": 28, "targets": ("ort",)}
LARGE = {"height": 1024, "width": 1024, "text_tokens": 512}
SMALL = {"height": 256, "width": 256, "text_tokens": 128}
EIGHT = Path(__file__).parent / "eight-prompts.txt"
SHORT_TRAINING = {"max_rounds": "1"}


@dataclass(frozen=True)
class Row:
    """One compilation; ``compares``: then a step of it with the module's; ``plays``: then a request with its default level."""

    name: str
    blocks: tuple[int, int]
    options: Mapping[str, Any]
    compares: bool = False
    plays: bool = False
    law: bool = False  # one of those that the law is fitted to


ROWS = (
    Row("1 + 1, 256², LESA", (1, 1), {**SMALL, "method": "lesa", "interval": 5, "steps": 28, "dtype": "float16",
                                      "targets": ("ort",), "prompts": EIGHT, "options": SHORT_TRAINING}, plays=True),
    Row("1 + 1, 1024²", (1, 1), {**BASE, **LARGE, "dtype": "float32"}, compares=True),
    Row("2 + 2, 1024²", (2, 2), {**BASE, **LARGE, "dtype": "float32"}, compares=True),
    Row("5 + 10, 1024²", (5, 10), {**BASE, **LARGE, "dtype": "bfloat16"}, law=True),
    Row("10 + 20, 1024²", (10, 20), {**BASE, **LARGE, "dtype": "bfloat16"}, law=True),
    Row("FLUX.1-dev, bfloat16", (19, 38), {**BASE, **LARGE, "dtype": "bfloat16"}, law=True),
    Row("FLUX.1-dev, float16", (19, 38), {**BASE, **LARGE, "dtype": "float16"}),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What was measured of a row."""

    name: str
    blocks: tuple[int, int]
    dtype: str
    stored_bytes: int
    compiled: Mapping[str, Any]
    compared: Mapping[str, Any] = field(default_factory=dict)
    played: Mapping[str, Any] = field(default_factory=dict)
    machine: str = field(default_factory=lambda: f"{_processor()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")


def measure(rows: Sequence[Row], work: Path) -> Iterator[Result]:
    """Rows one after the other, those of one model together; nothing of a model is left when the next is made."""
    held: tuple[int, int] | None = None
    stored = 0
    for row in sorted(rows, key=lambda one: sum(one.blocks)):
        if row.blocks != held:
            shutil.rmtree(work / "model", ignore_errors=True)
            stored, held = write_flux(work / "model", *row.blocks), row.blocks
        click.echo(f"{row.name}: {stored / 1e9:.1f} GB of weights", err=True)
        task = {"model": str(work / "model"), "out": str(work / "bundle.cachec")}
        compiled = _child({**task, "do": "compile", "options": row.options}, work)
        compared = _child({**task, "do": "compare"}, work) if row.compares else {}
        played = _child({**task, "do": "play"}, work) if row.plays else {}
        shutil.rmtree(work / "bundle.cachec")
        yield Result(row.name, row.blocks, row.options["dtype"], stored, compiled, compared, played)


def _child(task: Mapping[str, Any], work: Path) -> dict[str, Any]:
    path = work / "task.json"
    path.write_text(json.dumps(task, default=str))
    done = subprocess.run([sys.executable, "-m", "bench.sizes_child", str(path)], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def law(results: Sequence[Result], rows: Sequence[Row]) -> dict[str, float]:
    """Seconds and bytes of memory as straight lines over stored bytes, from the rows that are meant for it."""
    named = {row.name for row in rows if row.law}
    some = [one for one in results if one.name in named]
    if len(some) < 2:
        return {}
    stored = np.array([one.stored_bytes / 1e9 for one in some])
    found = {}
    for name, values in (("seconds", [one.compiled["seconds"] for one in some]),
                         ("rss_gb", [one.compiled["peak_rss"] / 1e9 for one in some])):  # fmt: skip
        slope, start = np.polyfit(stored, values, 1)
        found |= {f"{name}_at_zero": float(start), f"{name}_per_gb": float(slope)}
    return found


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def markdown(results: Sequence[Result], fitted: Mapping[str, float]) -> str:
    """The page."""
    lines = [
        "# A model of real size, compiled",
        "",
        "FLUX.1-dev's width, random weights, blocks (double + single) as the row says; ONNX target, 28 steps (`make sizes`).",
        "Weights are streamed: they are never in memory whole. *memory*: the peak of the process's resident set. The row of",
        "LESA records 8 prompts and trains for two rounds on the processor, in float32.",
        "",
        "| row | precision | weights | seconds | memory | bundle | a step beside the module | a request | measured on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        made, step = one.compiled, one.compared
        beside = f"{step['relative_error']:.1e} ({step['step_seconds']:.0f} s)" if step else "–"
        played = f"{one.played['seconds']:.0f} s" if one.played else "–"
        sizes = [f"{size / 1e9:.2f} GB" for size in (one.stored_bytes, made["peak_rss"], made["bundle_bytes"])]
        cells = (one.name, one.dtype, sizes[0], f"{made['seconds']:.0f}", *sizes[1:], beside, played, one.machine)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Seconds by stage:", "", "| row | " + " | ".join(results[0].compiled["stages"]) + " |"]
    lines.append("| --- |" + " --- |" * len(results[0].compiled["stages"]))
    lines += [f"| {one.name} | " + " | ".join(f"{s:.0f}" for s in one.compiled["stages"].values()) + " |" for one in results]
    if fitted:
        seconds = f"{fitted['seconds_at_zero']:.0f} + {fitted['seconds_per_gb']:.1f} W"
        memory = f"{fitted['rss_gb_at_zero']:.2f} GB + {1e3 * fitted['rss_gb_per_gb']:.0f} MB W"
        lines += ["", f"A line through the rows in bfloat16, over W GB of weights: seconds = {seconds}, memory = {memory}."]
    return "\n".join([*lines, ""])


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="cachec-sizes-") as name:
            yield Path(name)


@click.command()
@click.option("--only", multiple=True, help="Rows by name; all by default.")
@click.option("--work", type=click.Path(path_type=Path), help="A folder with 50 GB of room; a temporary one by default.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "sizes.json")
def main(only: Sequence[str], work: Path | None, out: Path) -> None:
    """Compile pipelines of FLUX.1-dev's width, and write what it took."""
    rows = [row for row in ROWS if not only or row.name in only]
    if unknown := set(only) - {row.name for row in ROWS}:
        raise click.UsageError(f"there is no row {', '.join(sorted(unknown))}: {', '.join(row.name for row in ROWS)}")
    with _folder(work) as folder:
        results = list(measure(rows, folder))
    kept = [Result(**one) for one in json.loads(out.read_text())["rows"]] if out.exists() else []
    by_name = {one.name: one for one in (*kept, *results)}
    shown = [by_name[row.name] for row in ROWS if row.name in by_name]
    fitted = law(shown, ROWS)
    out.write_text(json.dumps({"law": fitted, "rows": [asdict(one) for one in shown]}, indent=1) + "\n")
    page = out.with_name("SIZES.md")
    others = "".join(page.read_text(encoding="utf-8").partition(BEGIN)[1:]) if page.exists() else ""  # of bench.static
    page.write_text("\n".join(filter(None, (markdown(shown, fitted), others))))


if __name__ == "__main__":
    main()
