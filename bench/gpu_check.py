"""Does cachec work on this GPU, and how fast is it beside the others? ``python -m bench.gpu_check --out gpu.json``.

Run from a source tree; nothing needs to be installed but torch >= 2.11, diffusers, transformers, safetensors, numpy, click and
tqdm. What else is missing, or fails, is named in the JSON with its reason, and the rest goes on. Models: tiny-flux in float32,
and random weights of FLUX.1-dev's shape in bfloat16; where memory or time forbid, with fewer blocks of full width, which the
JSON and the terminal say. On the latter, calibration and LESA's training run too. All of it takes an hour; ``--models``,
``--blocks``, ``--steps``, ``--pixels`` and ``--minutes`` choose less.

Rows take turns; seconds are of the denoise loop with the device synchronised before and after, medians with quartiles. Parity
is the relative L2 distance of a row's uncached latents from diffusers eager's; that of ``torch.compile`` beside it says what
rounding alone does. ``--device cpu --small`` runs the same code on the CPU on a model that is too small to mean anything.
"""

import gc
import json
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

import bench.find_package  # noqa: F401  before anything of cachec
from bench.gpu_fits import fit_case
from bench.gpu_rows import (
    Case,
    Engines,
    Row,
    build_engines,
    cachec_rows,
    measure,
    open_random,
    open_tiny,
    peer_rows,
)
from bench.peers import synchronize
from bench.timing import spread
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError, MissingExtraError

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt-cu13",
    "cache-dit",
    "numpy",
)
BLOCKS = ((19, 38), (10, 20), (5, 10), (2, 4), (1, 2))  # double and single; the first is FLUX.1-dev
FEWER = 2  # from here on, weights are below FILES_UP_TO
FILES_UP_TO = 8e9  # bytes of weights; above, back ends that write them to files get a model with fewer blocks
IN_MEMORY = ("eager", "inductor")  # back ends that write none
PARITY = {"float32": 1e-3, "bfloat16": 5e-2}  # distance from eager, over all steps, that is always allowed
SHARE_OF_TIME = 0.6  # of the minutes left, that one resolution may be expected to take
MARGIN = 6e9  # bytes for activations, buffers and recordings beside the weights


@dataclass(frozen=True)
class Plan:
    """What is measured: numbers of steps, computed steps, runs of each row, and the back ends.

    ``prompts`` to calibrate on, on models whose weights are random, and ``updates`` of LESA's training; 0 for neither.
    """

    steps: tuple[int, ...]
    budgets: tuple[int, ...]
    repeats: int
    backends: tuple[str, ...]
    compiled: bool
    prompts: int = 0
    updates: int = 0


@dataclass(eq=False)
class Report:
    """The JSON, written after every section, so that what was measured is not lost."""

    path: Path
    deadline: float
    data: dict[str, Any] = field(default_factory=dict)

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def attempt(self, name: str, work: Callable[[], Any], *, raise_memory: bool = True) -> Any:
        """The result of ``work``; ``None`` if it cannot be had, which is recorded. Lack of memory is also raised, if wanted."""
        start, entry = time.monotonic(), dict[str, Any](section=name)
        self.data["sections"].append(entry)
        result = None
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        try:
            if self.minutes_left() > 0:
                result = work()
                entry["status"] = "ok"
            else:
                entry |= {"status": "skipped", "reason": "the minutes that were given are over"}
        except (InputError, MissingExtraError) as error:  # not on this machine, or not for this model
            entry |= {"status": "skipped", "reason": str(error)}
            if raise_memory and _lacks_memory(error):
                raise
        except Exception as error:
            where = traceback.format_exc().strip().splitlines()[-12:]
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000], "traceback": where}
            if raise_memory and _lacks_memory(error):
                raise
        except BaseException:
            entry |= {"status": "interrupted", "reason": "stopped from outside"}
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - start, 1)
            if torch.cuda.is_initialized():
                entry["peak_bytes"] = torch.cuda.max_memory_allocated()
            print(f"{name}: {entry['status']} ({entry['seconds']} s) {entry.get('reason', '')[:200]}", flush=True)
            self.write()
        return result

    def skip(self, name: str, reason: str) -> None:
        self.data["sections"].append({"section": name, "status": "skipped", "reason": reason})
        print(f"{name}: skipped, {reason}", flush=True)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def _lacks_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def check_case(case: Case, plan: Plan, report: Report) -> None:
    """All sections of one model: build, warm up, compare, measure."""
    entry = {"case": case.name, **case.facts, "rows": []}
    report.data["cases"].append(entry)
    engines: dict[str, Engines] = {}
    for backend in plan.backends:
        name = f"{case.name}: build {backend}"
        if backend not in IN_MEMORY and case.facts["weight_bytes"] > FILES_UP_TO:
            report.skip(name, f"it writes weights to files, and these are {case.facts['weight_bytes'] / 1e9:.0f} GB")
            continue
        built = report.attempt(name, lambda backend=backend: build_engines(case, backend))
        if built is not None:
            engines[backend] = built
    for number, steps in enumerate(plan.steps):
        name = f"{case.name}: measure {steps} steps"
        rows = report.attempt(name, lambda steps=steps: _check_steps(case, engines, plan, steps, report))
        entry["rows"] += rows or []
        report.write()
        gc.collect()
        if number == 0 and plan.prompts:
            fitted = replace(case, settings=replace(case.settings, steps=steps))
            name = f"{case.name}: calibrate and train"
            entry["fits"] = report.attempt(
                name, lambda fitted=fitted: fit_case(fitted, prompts=plan.prompts, updates=plan.updates)
            )
    for built in engines.values():
        built.close()


def _check_steps(case: Case, engines: Mapping[str, Engines], plan: Plan, steps: int, report: Report) -> list[dict[str, Any]]:
    budgets = [budget for budget in plan.budgets if budget < steps]
    rows: list[Row] = []
    makers = [*peer_rows(case, steps, budgets, compiled=plan.compiled)]
    own = [made for built in engines.values() for made in cachec_rows(case, built, steps, budgets)]
    for made in (*makers[:1], *own, *makers[1:]):  # what all are compared with, ours, the others
        row = report.attempt(f"{case.name}, {steps} steps: {made.name}", made.make, raise_memory=made.name == "diffusers")
        if row is not None and row.session is not None:  # the second request is recorded
            again = report.attempt(f"{case.name}, {steps} steps: {row.name}, again", row.warm_up)
            row = row if again else None
        rows += [] if row is None else [row]
    done = measure(rows, case, repeats=plan.repeats, deadline=report.deadline)
    return [_row_facts(row, rows, steps, done, case.settings.dtype) for row in rows]


def _row_facts(row: Row, rows: Sequence[Row], steps: int, repeats: int, dtype: str) -> dict[str, Any]:
    by_name = {other.name: other for other in rows}
    eager, base = by_name.get("diffusers"), next((r for r in rows if r.family == row.family and len(r.computed) == steps), None)
    facts: dict[str, Any] = {
        "row": row.name,
        "family": row.family,
        "steps": steps,
        "computed": list(row.computed),
        "first_seconds": round(row.first_seconds, 3),
        "runs": repeats,
        **row.facts(),
    }
    if row.seconds:
        median = statistics.median(row.seconds)
        facts["seconds"] = median
        facts["quartiles"] = [spread(row.seconds)["low"], spread(row.seconds)["high"]]
        if base is not None and base.seconds:
            facts["speedup"] = statistics.median(base.seconds) / median
            facts["of_ideal"] = facts["speedup"] * len(row.computed) / steps
        if eager is not None and eager.seconds:
            facts["over_eager"] = statistics.median(eager.seconds) / median
    if eager is not None and row is not eager and len(row.computed) == steps:
        compiled = by_name.get(
            "torch.compile, block by block", eager
        )  # what rounding alone does, more than once, is not held against a row
        allowed = max(PARITY[dtype], 2 * _distance(compiled.latents, eager.latents))
        facts["distance_from_eager"] = _distance(row.latents, eager.latents)
        facts["parity"] = facts["distance_from_eager"] <= allowed
    if row.last is not None:  # the same request, replayed where calls are recorded
        facts["distance_from_first_run"] = _distance(row.last, row.latents)
        facts["parity"] = facts.get("parity", True) and facts["distance_from_first_run"] <= PARITY[dtype]
    return facts


def _distance(latents: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((latents.float().cpu() - other).norm() / other.norm())


def check_random(pixels: int, plan: Plan, report: Report, device: torch.device, sizes: Sequence[tuple[int, int]]) -> None:
    """FLUX's shape at one resolution, with as many blocks as memory and time allow."""
    for blocks in sizes:
        name = f"FLUX.1-dev's shape, {blocks[0]} + {blocks[1]} blocks, {pixels} pixels"
        if _check_blocks(name, blocks, pixels, plan, report, device):
            return
        print(f"note: not {name}; with fewer blocks it only stands for FLUX.1-dev", flush=True)
    report.skip(f"FLUX.1-dev's shape, {pixels} pixels", "not even the smallest model was possible")


def _check_blocks(name: str, blocks: tuple[int, int], pixels: int, plan: Plan, report: Report, device: torch.device) -> bool:
    """Try one size; false if it is too much for this machine, which is recorded."""
    case = None
    try:
        case = report.attempt(f"{name}: make", lambda: open_random(device, blocks, pixels, max(plan.steps)))
        if case is None:
            return report.minutes_left() <= 0  # then smaller ones are too late as well
        if (reason := _too_much(case, plan, report)) is not None:
            report.skip(name, reason)
            return False
        check_case(case, plan, report)
    except Exception as error:
        if not _lacks_memory(error):
            raise
        report.skip(name, "the device's memory does not suffice")
        return False
    finally:
        if case is not None:
            case.close()
    return True


def _too_much(case: Case, plan: Plan, report: Report) -> str | None:
    """Why the case cannot be measured here; ``None`` if it can."""
    if case.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(case.device)
        needed = 0.4 * case.facts["weight_bytes"] + MARGIN  # merged and rearranged copies of some weights
        if free < needed:
            return f"{free / 1e9:.0f} GB are free beside the weights, {needed / 1e9:.0f} GB are wanted"
    step = case.time_step()
    runs = plan.repeats + 2
    expected = step * runs * sum(steps * (2 + len(plan.backends)) + 60 for steps in plan.steps) / 60
    allowed = SHARE_OF_TIME * report.minutes_left()
    if expected > allowed:
        return f"a step takes {step:.3f} s, so all rows some {expected:.0f} minutes; {allowed:.0f} may be used"
    return None


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    facts: dict[str, Any] = {"device": str(device), "python": platform.python_version(), "packages": {}}
    for package in PACKAGES:
        try:
            facts["packages"][package] = version(package)
        except PackageNotFoundError:
            facts["packages"][package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
        }
    else:
        facts |= {"processor": platform.machine(), "threads": torch.get_num_threads()}
    return facts


def _numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, such as 28,50") from error


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="JSON file.")
@click.option("--device", "device_name", default="cuda", show_default=True, help="cuda, cuda:1, or cpu.")
@click.option("--minutes", default=60.0, show_default=True, help="Stop measuring after these; models shrink to fit.")
@click.option("--repeats", default=5, show_default=True, help="Timed runs of each row.")
@click.option("--backends", "--backend", default="inductor,aoti,ort,tensorrt", show_default=True, help="Of cachec; also eager.")
@click.option("--models", default="tiny,flux", show_default=True, help="tiny-flux, FLUX's shape.")
@click.option("--blocks", default="19,38", show_default=True, callback=_numbers, help="Double and single blocks, at most.")
@click.option("--pixels", default="1024,512", show_default=True, callback=_numbers, help="Sizes of FLUX's shape.")
@click.option("--steps", default="28,50", show_default=True, callback=_numbers, help="Numbers of steps.")
@click.option("--budgets", default="8,10", show_default=True, callback=_numbers, help="Numbers of computed steps.")
@click.option("--prompts", default=16, show_default=True, help="To calibrate on, with FLUX's shape; 0 for none.")
@click.option("--updates", default=200, show_default=True, help="Of LESA's training.")
@click.option("--small", is_flag=True, help="A very small model, to see whether this program works.")
def main(
    out: Path,
    device_name: str,
    minutes: float,
    repeats: int,
    backends: str,
    models: str,
    blocks: tuple[int, ...],
    pixels: tuple[int, ...],
    steps: tuple[int, ...],
    budgets: tuple[int, ...],
    prompts: int,
    updates: int,
    small: bool,
) -> None:
    warnings.filterwarnings("ignore")
    device = _open_device(device_name, small=small)
    chosen = tuple(name.strip() for name in backends.split(",") if name.strip())
    plan = Plan(steps, budgets, repeats, chosen, compiled=True, prompts=prompts, updates=updates)
    report = Report(out, time.monotonic() + 60 * minutes, {"sections": [], "cases": []})
    report.data["setting"] = {**machine(device), "small": small, "minutes": minutes, "started": time.strftime("%F %T")}
    if small:
        report.skip("tiny-flux", "--small")
        report.skip("torch.compile", "--small")
        short = replace(plan, steps=(6,), budgets=(4,), compiled=False, prompts=min(prompts, 4), updates=min(updates, 6))
        check_random(64, short, report, device, [(1, 1)])
    else:
        if "tiny" in models.split(","):
            _check_tiny(plan, report, device)
        if "flux" in models.split(","):
            _check_flux(plan, report, device, (blocks[0], blocks[-1]), pixels)
    synchronize(device)
    report.data["setting"]["finished"] = time.strftime("%F %T")
    report.write()
    failed = [entry["section"] for entry in report.data["sections"] if entry["status"] == "failed"]
    apart = [row["row"] for case in report.data["cases"] for row in case["rows"] if row.get("parity") is False]
    print(f"wrote {out}; failed: {', '.join(failed) or 'nothing'}; too far apart: {', '.join(apart) or 'nothing'}")
    if failed or apart:
        raise SystemExit(1)


def _open_device(name: str, *, small: bool) -> torch.device:
    device = torch.device(str(DeviceName.parse(name)))
    if device.type == "cpu" and not small:
        raise click.ClickException("the models are too large for a CPU: add --small, or take bench.speed")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("torch.cuda.is_available() is False: there is no GPU, or torch is a CPU build")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _check_tiny(plan: Plan, report: Report, device: torch.device) -> None:
    steps = max(plan.steps)
    tiny = report.attempt("tiny-flux: load", lambda: open_tiny(device, steps))
    if tiny is not None:
        only = replace(plan, steps=(steps,), prompts=0)
        report.attempt("tiny-flux", lambda: check_case(tiny, only, report), raise_memory=False)
        tiny.close()


def _check_flux(plan: Plan, report: Report, device: torch.device, blocks: tuple[int, int], pixels: Sequence[int]) -> None:
    """FLUX's shape with at most so many blocks; what writes files gets a model that they are small enough for."""
    sizes = [blocks, *(fewer for fewer in BLOCKS if fewer < blocks)]
    for number, side in enumerate(pixels):
        check_random(side, plan if number == 0 else replace(plan, prompts=0), report, device, sizes)
    written = tuple(name for name in plan.backends if name not in IN_MEMORY)
    if written and any(case["weight_bytes"] > FILES_UP_TO for case in report.data["cases"]):
        less = replace(plan, steps=plan.steps[:1], backends=written, prompts=0)
        check_random(pixels[0], less, report, device, [fewer for fewer in sizes if fewer in BLOCKS[FEWER:]])


if __name__ == "__main__":
    main()
