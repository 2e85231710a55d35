"""Speed beside the peers: ``python -m bench.speed`` writes ``bench/speed.json``, the plots and ``bench/RESULTS.md``.

Every part runs in a process of its own, one at a time, and leaves a JSON file in the work directory; ``--keep`` takes those
that are there. ``--quick`` runs the same code with few repeats and a smaller model, and writes into its work directory only.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.plots import draw_plots
from bench.speed_report import report
from cachec.runtime.files import write_file

CASES = ("tiny-flux", "flux-shaped")
BACKENDS = ("ort", "aoti", "inductor")
GPU = Path("bench/gpu.json")


@dataclass(frozen=True)
class Part:
    """A module to run and what it is told; ``group`` is what ``--only`` calls it."""

    group: str
    module: str
    words: tuple[str, ...]
    case: str

    @property
    def name(self) -> str:
        return "-".join((self.group, *(word for word in self.words if word != self.group)))


def all_parts() -> list[Part]:
    """In the order in which they need each other: everything else loads the bundles."""
    parts = [Part("bundles", "bench.bundles", (case, backend), case) for case in CASES for backend in BACKENDS]
    parts += [Part("rows", "bench.rows", (case,), case) for case in CASES]
    parts += [Part("pairs", "bench.pairs", (case, backend), case) for case in CASES for backend in BACKENDS]
    parts += [Part("products", "bench.products", (case,), case) for case in CASES]
    parts += [Part("cold", "bench.cold", (case,), case) for case in CASES]
    parts += [Part(name, "bench.scaling", (name,), "tiny-flux") for name in ("tokens", "steps", "batch")]
    parts += [Part(name, "bench.session_costs", (name,), "tiny-flux") for name in ("overhead", "requests", "slots")]
    return parts


def choose_parts(only: str | None, case: str | None) -> list[Part]:
    """Those of the named groups and case.

    Raises:
        click.UsageError: a group does not exist.
    """
    parts = all_parts()
    groups = list(dict.fromkeys(part.group for part in parts))
    wanted = groups if only is None else only.split(",")
    if strange := [name for name in wanted if name not in (*groups, "report")]:
        raise click.UsageError(f"there is no part {', '.join(strange)}: take some of {', '.join(groups)}, report")
    return [part for part in parts if part.group in wanted and case in (None, part.case)]


def run_part(part: Part, work: Path, *, quick: bool) -> float:
    """Seconds it took; what it says goes to its log.

    Raises:
        click.ClickException: it failed; with the end of its log.
    """
    out, log, raw = (work / f"{part.name}.{ending}" for ending in ("json", "log", "partial"))
    command = [sys.executable, "-m", part.module, *part.words, str(work), str(raw), *(["--quick"] if quick else [])]
    start = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise click.ClickException(f"{part.name} failed ({code}); go on with --keep once it is mended:\n{tail}")
    seconds = time.perf_counter() - start
    write_file(out, (json.dumps({**json.loads(raw.read_text()), "wall_seconds": seconds}, indent=1) + "\n").encode())
    raw.unlink()
    return seconds


def collect(work: Path, parts: Sequence[Part], *, quick: bool) -> dict[str, Any]:
    """All parts that have been measured, by name, and the names of those that have not."""
    files = {part.name: work / f"{part.name}.json" for part in parts}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    gpu = json.loads(GPU.read_text()) if GPU.is_file() else None
    return {"quick": quick, "parts": found, "missing": [name for name in files if name not in found], "gpu": gpu}


@click.command()
@click.option("--only", help="Parts, with commas: bundles, rows, pairs, cold, tokens, …, report [default: all].")
@click.option("--case", type=click.Choice(CASES), help="One model only.")
@click.option("--keep", is_flag=True, help="Do not measure again what has been measured.")
@click.option("--quick", is_flag=True, help="Few repeats and a smaller model, to try the code; leaves bench/ alone.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Work directory; results go there, too [default: build/bench, and bench/]."
)
def main(only: str | None, case: str | None, keep: bool, quick: bool, work: Path | None) -> None:
    out = work or Path("build/bench-quick" if quick else "bench")
    work = work or Path("build/bench-quick" if quick else "build/bench")
    (work / "bundles").mkdir(parents=True, exist_ok=True)
    parts = choose_parts(only, case)
    for number, part in enumerate(parts):
        label = f"[{number + 1}/{len(parts)}] {part.name}"
        if keep and (work / f"{part.name}.json").is_file():
            print(f"{label}: kept", flush=True)
            continue
        print(f"{label} …", end="", flush=True)
        print(f" {run_part(part, work, quick=quick):.0f} s", flush=True)
    data = collect(work, all_parts(), quick=quick)
    (out / "speed.json").write_text(json.dumps(data, indent=1) + "\n")
    pictures = draw_plots(data, out)
    (out / "RESULTS.md").write_text(report(data, pictures))
    print(f"{out / 'RESULTS.md'}: {len(data['parts'])} parts, {len(data['missing'])} missing", flush=True)


if __name__ == "__main__":
    main()
