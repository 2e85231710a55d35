"""Small things that all parts of the speed bench share: clocks, spreads, and facts of this machine."""

import datetime
import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

PAUSE = 0.05  # seconds; OpenMP's and ONNX Runtime's threads spin for some milliseconds after a call
LIBRARIES = ("torch", "diffusers", "onnxruntime", "cache-dit", "numpy")


def settle() -> None:
    """Take the collector's work out of what is timed next: what lives now is not looked at again."""
    gc.collect()
    gc.freeze()


def timed(run: Callable[[], object], warm: Callable[[], object] | None = None) -> float:
    """Seconds of ``run``, after a pause and an untimed run of ``warm``."""
    time.sleep(PAUSE)
    if warm is not None:
        warm()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeat_for(run: Callable[[], object], seconds: float, *, least: int = 3, most: int = 30) -> list[float]:
    """Seconds of each run, for so long in all; the caller has warmed up."""
    spent: list[float] = []
    while len(spent) < least or (len(spent) < most and sum(spent) < seconds):
        spent.append(timed(run))
    return spent


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def facts() -> dict[str, Any]:
    """Where and when a part was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1]
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0],
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory) / 2**20),
        "python": platform.python_version(),
        "versions": versions,
    }


def part_arguments(*names: str) -> Callable[[Any], Any]:
    """Of a part's command: its own ``names``, the work directory, the file to write, and ``--quick``."""

    def apply(function: Any) -> Any:
        function = click.option("--quick", is_flag=True)(function)
        for path in ("out", "work"):
            function = click.argument(path, type=click.Path(path_type=Path))(function)
        for name in reversed(names):
            function = click.argument(name)(function)
        return function

    return apply


def write_part(out: Path, data: dict[str, Any]) -> None:
    """One part's figures, with where and when."""
    out.write_text(json.dumps({**data, "facts": facts()}, indent=1) + "\n")
