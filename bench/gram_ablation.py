"""What helps ``gram`` and what does not: ``python -m bench.gram_ablation --work build/quality``, after ``bench.quality``.

Variants of the closed-form fit at the schedules that the bench found on tiny-flux, and calibration on captions that share no
colour of clothes or hair with those that it is measured on. Writes ``bench/gram_ablation.json``. Relative errors of the final
latents in dB, mean over prompts that no fit saw; differences are paired.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.quality_methods import EQUAL
from bench.quality_setting import NUM_FIT, Extent, Setting, calibrate, open_model, open_setting
from cachec.compiler.calibration.calibration import Calibration, open_calibration, relative_errors
from cachec.compiler.calibration.runs import Subject
from cachec.compiler.calibration.uses import Use, UsedPrompts
from cachec.compiler.methods.gram_fit import fit_rows, node_timesteps, polish
from cachec.compiler.models import find_model
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from reference.avatars.attributes import looks, say

MODEL = "tiny-flux"
RIDGE = 1e-9
MAX_POLISHED = 8  # computed steps
NUM_MEASURED = 64
WARM, COLD = {"red", "orange", "yellow", "purple"}, {"green", "blue", "black", "white"}  # clothes
LIGHT, DARK = {"ginger", "blond", "pink"}, {"black", "blue", "white"}  # hair, or brows and beard
SAME = "with green, blue, black or white clothes and black, blue or white hair"
DISJOINT = "with other colours of clothes and hair"


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


def ablate(setting: Setting, schedule: Schedule) -> dict[str, Any]:
    fit, held_out = setting.fit, setting.calibration.of("choose").select(range(NUM_MEASURED))
    result: dict[str, Any] = {}
    reference = None
    for variant in VARIANTS:
        _, rows = run_variant(variant, fit, schedule, None)
        values = decibels_by_prompt(run_variant(variant, held_out, schedule, rows)[0], held_out)
        reference = values if reference is None else reference
        result[variant.name] = paired(values, reference)
        print(len(schedule.compute), variant.name, result[variant.name], flush=True)
    short = len(schedule.compute) <= MAX_POLISHED
    tables = _polished(fit, schedule) if short else {"cross-validated ridge": fit_rows(fit, schedule)}
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
    free = fit_rows(fit, schedule, free_times=True)
    free_once = polish(fit, free, rounds=1)
    return {"cross-validated ridge": table, "told times free, node by node": free, "polished rows, 1 round": rows_only,
            "polished rows and time steps, 1 round": once, "1 round from free told times": free_once,
            "2 rounds": polish(fit, once, rounds=1),
            "2 rounds from free told times": polish(fit, free_once, rounds=1)}  # fmt: skip


def shifted(setting: Setting, schedule: Schedule) -> dict[str, Any]:
    """Fits on captions of other colours, or of the same."""
    sets = {"same": _captions(COLD, DARK, 303), "disjoint": _captions(WARM, LIGHT, 304)}
    opened, subject = {}, Subject.of(setting.model, setting.settings)
    for seed, (name, captions) in enumerate(sets.items(), start=1):
        uses: list[Use] = ["fit" for _ in captions]
        used, path = UsedPrompts(tuple(captions), tuple(uses)), setting.work / f"colours-{name}"
        opened[name] = open_calibration(
            calibrate(subject, setting.evaluator, used, path, seed=seed), subject, setting.evaluator
        )
    held_out = opened["same"].select(range(NUM_FIT, 2 * NUM_FIT))
    result, base = {}, None
    for name in sets:
        values = decibels_of(fit_rows(opened[name].select(range(NUM_FIT)), schedule), held_out)
        base = values if base is None else base
        result[name] = paired(values, base)
        print("captions", name, result[name], flush=True)
    return result


def _captions(clothes: set[str], hair: set[str], seed: int) -> list[str]:
    """``2 NUM_FIT`` captions of training combinations in these colours."""
    rng, found = np.random.default_rng(seed), list[str]()
    for look in looks(seed, held_out=False):
        caption = say(look, rng).caption
        if look.clothes_colour in clothes and look.hair_colour in hair and caption not in found:
            found.append(caption)
        if len(found) == 2 * NUM_FIT:
            break
    return found


def schedules_of(work: Path) -> dict[int, Schedule]:
    """The searched schedules of the bench, by their computed steps; as far as they are there."""
    rows = json.loads((work / MODEL / "rows.json").read_text(encoding="utf-8"))["rows"]
    keys = {budget: f"{EQUAL}|{budget}|gram, closed form|searched" for budget in (6, 8, 10)}
    return {budget: Schedule(50, tuple(rows[key]["steps"])) for budget, key in keys.items() if key in rows}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/gram_ablation.json"), show_default=True)
def main(work: Path, out: Path) -> None:
    warnings.filterwarnings("ignore")
    model, settings = open_model(find_model(MODEL))
    setting, schedules = open_setting(model, settings, work / MODEL, Extent()), schedules_of(work)
    result: dict[str, Any] = {"model": MODEL, "num_fit": NUM_FIT, "same": SAME, "disjoint": DISJOINT}
    result["schedules"] = {budget: list(schedule.compute) for budget, schedule in schedules.items()}
    result["variants"] = {budget: ablate(setting, schedule) for budget, schedule in schedules.items()}
    result["captions"] = shifted(setting, schedules[8])
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
