"""Engines of TensorRT for RTX, and what low precision costs: ``python -m bench.engines`` writes ``bench/ENGINES.md``.

Neither needs a GPU. Engines are built from bundles of both models of the speed bench, each time in a fresh process; errors are
measured with PyTorch on tiny-flux's held-out captions. A quarter of an hour on two idle cores; ``--quick`` runs the same code
with few repeats on a smaller model.
"""

import copy
import json
import logging
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.cases import CASES, METHODS, TINY, Case, open_case
from bench.speed_report import table
from bench.timing import facts
from cachec.compiler.calibration.metrics import latent_rel_l2
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.graphs.capture import capture_model, named_model
from cachec.compiler.models.base import tensors_from
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.passes import canonical_passes, cast_passes, run_passes
from cachec.runtime.abi import MODEL
from cachec.runtime.bundle import Bundle
from cachec.runtime.files import write_file
from cachec.runtime.noise import make_noise

DTYPES = ("float32", "float16", "bfloat16")
LOW = DTYPES[1:]
NUM_PROMPTS = 16
REPEATS = 5
EVERY = 7  # steps of the exact run at which velocities are compared
OUT = Path("bench/ENGINES.md")
ENGINES = ("prologue", "compute", "forecast", "advance")


def compile_case(name: str, dtype: str, work: Path, *, quick: bool) -> Path:
    """A bundle of one model in one precision, with ONNX files."""
    case, (method, options) = open_case(name, work, quick=quick), METHODS["hidden"]
    chosen = {"method": method, "options": options, "steps": case.steps, "budget": case.budgets[-1], "schedule": "uniform"}
    request = make_request(case.model.spec, dtype=dtype, **chosen)  # type: ignore[arg-type]
    return compile_bundle(case.model, request, work / "engines" / f"{name}-{dtype}.cachec", force=True).bundle.root


def build_engines(root: Path) -> dict[str, Any]:
    """Build the engines of a bundle in a fresh process: sizes, seconds and memory.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", "bench.engine_child", str(root)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"no engines of {root}:\n{child.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def onnx_bytes(root: Path) -> int:
    """Of a bundle's ONNX files and their weights."""
    files = Bundle.open(root).manifest.files
    return sum(entry["bytes"] for name, entry in files.items() if Path(name).suffix in (".onnx", ".bin"))


@torch.no_grad()
def measure_errors(case: Case, dtype: torch.dtype, prompts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Relative L2 errors against the model in float32: of velocities on its path, by step and prompt; of what a run ends with.

    ``pass`` is the graph that ``cast_precision`` makes, ``whole`` the model cast as a whole, whose pipeline rounds the
    timesteps, too. The sampler is float32 in both.
    """
    model, settings = case.model, case.settings
    io, sampling = model.io, model.sampling(settings)
    sigmas, timesteps = sampling.sigmas, sampling.timesteps
    constants, conditions = model.constants(settings), tensors_from(model.encode(prompts, settings, model.io.conditions))
    captured = capture_model(model.transformer, model.example_inputs(settings), constants)
    cast = run_passes(captured, [canonical_passes(), cast_passes(dtype)]).modules[MODEL]
    whole, exact = (named_model(m, constants) for m in (copy.deepcopy(model.transformer).to(dtype), model.transformer))
    rounded = ((torch.from_numpy(timesteps) * 1000).to(dtype).float() / 1000).numpy()
    shape = model.example_inputs(settings, batch=1)[io.latents].shape[1:]
    noise = torch.from_numpy(np.stack([make_noise(seed, tuple(shape)) for seed in range(len(prompts))]))

    def velocity(run: Callable[..., Any], latents: torch.Tensor, time: float) -> torch.Tensor:
        return run({io.latents: latents, io.timestep: torch.full((len(latents),), time), **conditions})["velocity"]

    runs = {
        "exact": (exact, timesteps),
        "pass": (lambda inputs: cast(**inputs), timesteps),
        "whole": (whole, rounded),
    }
    latents, errors = dict.fromkeys(runs, noise), {name: [] for name in ("pass", "whole")}
    for step, change in enumerate(np.diff(sigmas)):
        if step % EVERY == 0:
            wanted, *others = (velocity(run, latents["exact"], float(times[step])) for run, times in runs.values())
            for name, got in zip(errors, others, strict=True):
                errors[name].append(_each(got, wanted))
        for name, (run, times) in runs.items():
            latents[name] = latents[name] + float(change) * velocity(run, latents[name], float(times[step]))
    return {
        name: {"velocity": np.concatenate(found), "latents": _each(latents[name], latents["exact"])}
        for name, found in errors.items()
    }


def _each(got: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    return np.array([latent_rel_l2(a.numpy(), b.numpy()) for a, b in zip(got, wanted, strict=True)])


def report(builds: Sequence[Mapping[str, Any]], errors: Mapping[str, Any], prompts: int, command: str) -> str:
    """The whole page."""
    there = facts()
    rows = [_build_row(build) for build in builds]
    header = ["engines of", "precision", *(f"{name}, MB" for name in ENGINES), "seconds", "peak, GB", "ONNX and weights, MB"]
    lines = [
        [dtype, {"pass": "`cast_precision`", "whole": "the model cast as a whole"}[name], *map(_percent, found.values())]
        for dtype, both in errors.items() for name, found in both.items()
    ]  # fmt: skip
    runs = [run for build in builds for run in build["runs"]]
    idle = statistics.median([run["before"] for run in runs])
    versions = sorted({run["version"] for run in runs})
    return f"""# Engines and precision

`{command}`, {there["date"]}: {there["cores"]} cores, {there["cpu"]}, no GPU, torch {there["versions"]["torch"]}.

## TensorRT for RTX {", ".join(versions)}

From the ONNX files of a bundle, as `cachec add-target BUNDLE --target tensorrt-rtx` does it. Seconds of all four engines with
checking, hashing and writing: medians of {len(builds[0]["runs"])}, each in a process of its own, with range. Peak of resident
memory; {idle / 1e6:.0f} MB of it are the process before it builds.

{table(header, rows)}
## What low precision costs

tiny-flux, relative L2 error against float32, uncached, PyTorch on the CPU: of velocities on the path of the exact run, at every
{EVERY}th of its 50 steps (the largest are at the last, where almost no noise is left), and of the latents that a run of its own
ends with. {prompts} held-out captions; medians with range.

{table(["precision", "", "velocity", "final latents"], lines)}"""


def _build_row(build: Mapping[str, Any]) -> list[object]:
    runs = build["runs"]
    seconds = [run["seconds"] for run in runs]
    sizes = (f"{runs[-1]['bytes'][name] / 1e6:.1f}" for name in ENGINES)
    spent = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"
    peak = max(run["peak_rss"] for run in runs) / 1e9
    return [build["case"], build["dtype"], *sizes, spent, f"{peak:.2f}", f"{build['onnx'] / 1e6:.1f}"]


def _percent(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{100 * np.median(values):.3f} % ({100 * low:.3f}–{100 * high:.3f})"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help=f"Default: {OUT}; with --quick, a file in the work directory.")
@click.option("--quick", is_flag=True)
def main(work: Path, out: Path | None, quick: bool) -> None:
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")
    work = work / "quick" if quick else work
    work.mkdir(parents=True, exist_ok=True)
    out = out or (work / OUT.name if quick else OUT)
    builds = []
    for name in CASES:
        for dtype in DTYPES:
            root = compile_case(name, dtype, work, quick=quick)
            runs = [build_engines(root) for _ in range(1 if quick else REPEATS)]
            builds.append({"case": name, "dtype": dtype, "onnx": onnx_bytes(root), "runs": runs})
            print(f"{name} {dtype}: {runs[-1]}", flush=True)
    case = open_case(TINY, work, quick=quick)
    prompts = default_prompts("avatars", "eval")[: 2 if quick else NUM_PROMPTS]
    errors = {dtype: measure_errors(case, getattr(torch, dtype), prompts) for dtype in LOW}
    command = "python -m bench.engines" + " --quick" * quick
    write_file(out, report(builds, errors, len(prompts), command).encode())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
