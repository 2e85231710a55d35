"""What helps ``gram`` and what does not: ``python -m bench.gram_ablation --work build/quality``, after ``bench.quality``.

Variants of the closed-form fit at the schedules that the bench found, and calibration on captions that share no colour, no
shape and no place with those that it is measured on. Writes ``bench/gram_ablation.json``. Relative errors of the final latents
in dB, mean over prompts that no fit saw; differences are paired.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.quality import NUM_FIT, open_setting
from cachec.compiler.calibration.calibration import Calibration, open_calibration, relative_errors
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.statistics import record_statistics
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.methods.gram_fit import fit_rows, node_timesteps, polish
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from reference.dataset import Scene, scenes

RIDGE = 1e-9
MAX_POLISHED = 8  # computed steps
WARM, COLD = {"red", "orange", "yellow", "purple"}, {"green", "cyan", "blue", "white"}
ROUND, ANGULAR = {"circle", "ring"}, {"square", "triangle", "cross"}
HERE, THERE = {"left", "top", "left of"}, {"right", "bottom", "centre", "above"}


@dataclass(frozen=True)
class Variant:
    """A closed-form fit.

    ``history``: the last so many velocities, from the last node on (``None``: all, from the noise). ``noise``, ``constant``:
    extra regressors. ``reweight``: rounds of weighting prompts by 1 / error^2. ``open_loop``: fitted on the uncached run's
    velocities instead of its own. ``channels``: a weight for each latent channel.
    """

    name: str
    history: int | None = None
    noise: bool = False
    constant: bool = False
    reweight: int = 0
    open_loop: bool = False
    channels: bool = False


VARIANTS = (
    Variant("closed form"),
    *(Variant(f"history of {h}", history=h) for h in (1, 2, 3, 4)),
    Variant("affine: noise's share free", noise=True),
    Variant("affine: constant", constant=True),
    Variant("prompts weighted by 1 / error^2", reweight=3),
    Variant("open loop (no iteration)", open_loop=True),
    Variant("weights per latent channel", channels=True),
)


def run_variant(variant: Variant, calibration: Calibration, schedule: Schedule, rows: list[np.ndarray] | None):
    """Fit (``rows`` None) or play: final latents and the rows [n, C] of each node."""
    noise, times, found = calibration.noise(), node_timesteps(calibration, schedule), []
    x, velocities, truth = noise, [], []
    for i, end in enumerate([*schedule.compute[1:], schedule.num_steps]):
        step = schedule.compute[i]
        velocities.append(calibration.velocities(x, float(times[i]), step))
        if variant.open_loop and rows is None:
            truth.append(calibration.velocities(calibration.latents(step), float(times[i]), step))
        base = noise if variant.history is None else x
        some = slice(None) if variant.history is None else slice(-variant.history, None)
        extra = [noise] * variant.noise + [np.ones_like(noise)] * variant.constant
        regressors = np.stack([*velocities[some], *extra])
        if rows is None:
            seen = np.stack([*truth[some], *extra]) if variant.open_loop else regressors
            start = calibration.latents(step) if variant.open_loop and variant.history is not None else base
            found.append(_solve(variant, seen, calibration.latents(end) - start))
        x = base + np.einsum("npld,nd->pld", regressors, (found if rows is None else rows)[i])
    return x, found


def _solve(variant: Variant, regressors: np.ndarray, target: np.ndarray) -> np.ndarray:
    num, channels = len(regressors), target.shape[-1]
    if variant.channels:
        parts = [_least_squares(regressors[..., c], target[..., c], 0) for c in range(channels)]
        return np.stack(parts, axis=1)
    row = _least_squares(regressors.reshape(*regressors.shape[:2], -1), target.reshape(len(target), -1), variant.reweight)
    return np.broadcast_to(row[:, None], (num, channels))


def _least_squares(regressors: np.ndarray, target: np.ndarray, reweight: int) -> np.ndarray:
    a, b = regressors.astype(np.float64), target.astype(np.float64)
    by_prompt = a.swapaxes(0, 1)
    products, wanted = by_prompt @ by_prompt.swapaxes(1, 2), (by_prompt @ b[:, :, None])[:, :, 0]
    weights = np.ones(len(products))
    for _ in range(reweight + 1):
        g, w = (products * weights[:, None, None]).sum(0), (wanted * weights[:, None]).sum(0)
        row = np.linalg.solve(g + RIDGE * g.trace() / len(g) * np.eye(len(g)), w)
        weights = 1 / np.maximum(((b - np.tensordot(row, a, 1)) ** 2).sum(1), 1e-12)
    return row.astype(np.float32)


def decibels_by_prompt(latents: np.ndarray, calibration: Calibration) -> np.ndarray:
    return -20 * np.log10(np.maximum(relative_errors(latents, calibration.latents(calibration.num_steps)), 1e-12))


def decibels_of(table: AdvanceTable, calibration: Calibration) -> np.ndarray:
    return decibels_by_prompt(calibration.play(calibration.program(table)), calibration)


def paired(values: np.ndarray, base: np.ndarray) -> dict[str, float]:
    change = values - base
    return {"db": round(float(values.mean()), 3), "change": round(float(change.mean()), 3),
            "stderr": round(float(change.std(ddof=1) / len(change) ** 0.5), 3)}  # fmt: skip


def ablate(calibration: Calibration, schedule: Schedule) -> dict[str, Any]:
    fit, held_out = calibration.select(range(NUM_FIT)), calibration.select(range(NUM_FIT, calibration.num_prompts))
    result: dict[str, Any] = {}
    reference = None
    for variant in VARIANTS:
        _, rows = run_variant(variant, fit, schedule, None)
        values = decibels_by_prompt(run_variant(variant, held_out, schedule, rows)[0], held_out)
        reference = values if reference is None else reference
        result[variant.name] = paired(values, reference)
        print(len(schedule.compute), variant.name, result[variant.name], flush=True)
    tables = (
        _polished(fit, schedule)
        if len(schedule.compute) <= MAX_POLISHED
        else {"cross-validated ridge": fit_rows(fit, schedule)}
    )
    base = decibels_of(tables["cross-validated ridge"], held_out)
    for name, table in tables.items():
        values = decibels_of(table, held_out)
        result[name] = paired(values, reference if name == "cross-validated ridge" else base)
        print(len(schedule.compute), name, result[name], flush=True)
    return result


def _polished(fit: Calibration, schedule: Schedule) -> dict[str, AdvanceTable]:
    table = fit_rows(fit, schedule)
    once = polish(fit, table, rounds=1)
    rows_only = polish(fit, table, rounds=1, move_timesteps=False)
    return {"cross-validated ridge": table, "polished rows, 1 round": rows_only, "polished rows and time steps, 1 round": once,
            "2 rounds": polish(fit, once, rounds=1)}  # fmt: skip


def shifted(work: Path) -> dict[str, Any]:
    """Fits on captions of other colours, shapes and places, or of the same; 8 of 50 steps."""
    setting = open_setting("50 steps", work, steps=50, shift=None, num=64)
    sets = {"warm": _captions(WARM, ROUND, HERE), "cold": _captions(COLD, ANGULAR, THERE)}
    opened, subject = {}, Subject.of(setting.model, setting.settings)
    for name, captions in sets.items():
        seed = 1 if name == "warm" else 2
        used, parts = UsedPrompts(tuple(captions), ("fit",) * len(captions)), work / f"shift {name}.parts"
        statistics = record_statistics(
            subject, recording_here(subject, setting.evaluator), used, reference_steps=0, seed=seed, work=parts
        )
        opened[name] = open_calibration(statistics, subject, setting.evaluator)
    held_out = opened["cold"].select(range(NUM_FIT, 2 * NUM_FIT))
    rows = json.loads((work / "rows 50 steps.json").read_text())
    schedule = Schedule(50, tuple(rows["50 steps|8|gram|searched"]["steps"]))
    result, base = {}, None
    for name, fit in (("same", opened["cold"]), ("disjoint", opened["warm"])):
        values = decibels_of(fit_rows(fit.select(range(NUM_FIT)), schedule), held_out)
        base = values if base is None else base
        result[name] = paired(values, base)
        print("captions", name, result[name], flush=True)
    return result


def _captions(colours: set[str], shapes: set[str], places: set[str]) -> list[str]:
    stream, found = scenes(303, held_out=True), []
    while len(found) < 2 * NUM_FIT:
        scene: Scene = next(stream)
        fits = all(item.colour in colours and item.shape in shapes for item in scene.items) and scene.place in places
        if fits and scene.caption() not in found:
            found.append(scene.caption())
    return found


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/gram_ablation.json"), show_default=True)
def main(work: Path, out: Path) -> None:
    warnings.filterwarnings("ignore")
    setting = open_setting("50 steps", work, steps=50, shift=None, num=64)
    rows = json.loads((work / "rows 50 steps.json").read_text())
    schedules = {k: Schedule(50, tuple(rows[f"50 steps|{k}|gram|searched"]["steps"])) for k in (6, 8, 10)}
    result: dict[str, Any] = {"schedules": {k: list(s.compute) for k, s in schedules.items()}}
    result["variants"] = {k: ablate(setting.calibration, schedule) for k, schedule in schedules.items()}
    result["captions"] = shifted(work)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
