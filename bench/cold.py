"""A fresh process for every row: ``python -m bench.cold CASE WORK OUT``. Import, first latents, first picture, peak memory.

The first run of a row finds empty caches of its own (compiled kernels, known file hashes); the later ones find what it left.
The files themselves are in the page cache in all of them.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from bench.bundles import BACKENDS, bundle_path, conditions_path
from bench.cases import Case, open_case, shaped_weights
from bench.cold_child import PEERS
from bench.timing import PAUSE, part_arguments, write_part
from cachec.compiler.tables.schedule import uniform_schedule


def make_tasks(case: Case, work: Path) -> dict[str, dict[str, Any]]:
    """What each row's process is told, by the row's name."""
    settings, budget = case.settings, case.budgets[-1]
    conditions = str(conditions_path(work, case.name).resolve())
    common: dict[str, Any] = {"conditions": conditions}
    if case.pictures:
        common |= {"prompt": case.prompts[0]}
    mask = [0, *(step + 1 for step in uniform_schedule(case.steps - 1, budget - 1).compute)]
    sizes = {name: getattr(settings, name) for name in ("steps", "guidance", "height", "width", "text_tokens")}
    directory = case.model.spec.source if case.pictures else str(shaped_weights(work).resolve())
    tasks = {}
    for peer in PEERS:
        idle = peer.startswith("diffusers FirstBlockCache") and not case.pictures  # skips nothing on random weights
        if not idle and (not peer.startswith("cache-dit") or find_spec("cache_dit") is not None):
            tasks[peer] = {"kind": "diffusers", "peer": peer, "directory": directory, "compute": mask, **sizes, **common}
    for backend in BACKENDS:
        task = {"backend": backend, "bundle": str(bundle_path(work, case.name, backend).resolve()), **common}
        tasks[f"cachec {backend}"] = {"kind": "bundle", **task}
        if case.pictures and backend != "inductor":  # nobody starts it cold for one picture: it compiles first
            tasks[f"cachec {backend}, text to picture"] = {"kind": "bundle pictures", **task}
    return tasks


def run_child(task: dict[str, Any], caches: Path) -> dict[str, Any]:
    """One process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    caches.mkdir(parents=True, exist_ok=True)
    known = {"CACHEC_CACHE": str(caches / "cachec"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    time.sleep(PAUSE)
    given = json.dumps({**task, "started": time.time()})
    command = [sys.executable, "-m", "bench.cold_child"]
    child = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env={**os.environ, **known})
    if child.returncode:
        raise RuntimeError(f"{task} failed:\n{child.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def measure(name: str, task: dict[str, Any], caches: Path, repeats: int) -> dict[str, Any]:
    """The first run, and medians: of all runs, or of the later ones of what compiles kernels or remembers hashes."""
    remembers = name.startswith(("torch.compile", "cachec"))
    runs = [run_child(task, caches) for _ in range(repeats + remembers)]
    first, counted = runs[0], runs[remembers:]
    seconds = {mark: statistics.median(run["seconds"][mark] for run in counted) for mark in first["seconds"]}
    peak = max(run["peak_rss"] for run in counted)
    return {"first": first, "later": {"seconds": seconds, "peak_rss": peak}, "runs": len(counted)}


@click.command()
@part_arguments("name")
def main(name: str, work: Path, out: Path, quick: bool) -> None:
    case = open_case(name, work, quick=quick)
    caches = work / "cold-caches" / name
    shutil.rmtree(caches, ignore_errors=True)
    rows = {}
    for label, task in make_tasks(case, work).items():
        rows[label] = measure(label, task, caches / label.replace(" ", "-"), case.sizes.cold_repeats)
        mark, seconds = list(rows[label]["later"]["seconds"].items())[-1]
        print(f"{label}: {seconds:.2f} s to {mark}", flush=True)
    shutil.rmtree(caches)
    write_part(out, {"case": name, "rows": rows, "budget": case.budgets[-1], "steps": case.steps})


if __name__ == "__main__":
    main()
