"""Every method at every budget, on its own published schedule and on a searched one: ``python -m bench.quality``.

Writes ``bench/quality.json`` (every row, prompt by prompt) and, with ``bench/quality_report.py``, ``bench/QUALITY.md`` and its
plots. Finished rows are kept in the work directory; an interrupted run goes on where it was. About an hour on two idle cores.

tiny-flux; fitted on 32 training captions, measured on 64 held-out captions, seeds from 0.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.published_schedules import cem_schedule, lemica_schedule
from cachec.compiler.calibration.calibration import Calibration, decibels, open_calibration, relative_errors
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.metrics import psnr_db
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import Subject, recording_here, run_uncached
from cachec.compiler.calibration.statistics import load_statistics, record_statistics, save_statistics
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import Method
from cachec.compiler.methods.gram_fit import fit_rows, polish
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.training import find_shipped
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.planning.search import (
    CLOSED_MOVES,
    FEW_SCHEDULES,
    few_prompts,
    polish_schedule,
    search_schedule,
    search_schedules,
    solver_score,
)
from cachec.compiler.tables.coefficients import AdvanceTable, Table
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.samplers import SOLVERS, solver_rows
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule, interval_for_budget
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import ProgramKey, hash_sigmas

FEW_BUDGETS = (6, 8, 10)  # everything, with closed-loop searches
MORE_BUDGETS = (4, 5, 7, 13, 17)  # fewer methods, and searches of others than gram stay in the Gram domain
MORE_SOLVERS = ("euler", "ab2", "unipc", "dpm")
MORE_CACHES = ("reuse", "taylor:1", "taylor:2", "spectrum", "adams:2", "l2p (closed)")
MORE_SEARCHED = ("ab2", "unipc", "taylor:1")
MAX_POLISHED = 10  # computed steps; a Jacobian takes a cubic number of model evaluations
FEW_SOLVERS = ("euler", "ab2", "unipc")  # in the other settings
FEW_CACHES = ("taylor:1", "adams:2", "l2p (closed)")
NUM_FIT = 32
CHUNK = 16
FINE = 200
CACHES = {
    "reuse": ("reuse", {}),
    "taylor:1": ("taylor", {"order": "1"}),
    "taylor:2": ("taylor", {"order": "2"}),
    "newton:2": ("newton", {"order": "2"}),
    "hicache": ("hicache", {}),
    "foca": ("foca", {}),
    "spectrum": ("spectrum", {}),
    "adams:2": ("adams", {"order": "2"}),
    "l2p (Adam)": ("l2p", {"fit": "adam"}),
    "l2p (closed)": ("l2p", {"fit": "closed"}),
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A sampler setting with its calibration and its evaluation set."""

    name: str
    model: LoadedModel
    settings: Settings
    calibration: Calibration
    fine: Calibration | None
    evaluator: Evaluator
    conditions: dict[str, np.ndarray]
    noise: np.ndarray
    reference: np.ndarray
    pictures: list[np.ndarray]
    fine_pictures: list[np.ndarray]

    @property
    def num_steps(self) -> int:
        return self.settings.steps

    def measure(self, table: Table, sampling: Sampling | None = None) -> dict[str, Any]:
        """PSNR by prompt against the uncached and the fine pictures, and latent errors; on the own grid unless told."""
        sampling, parts = sampling or self.calibration.sampling, []
        key = ProgramKey(sampling.num_steps, hash_sigmas(sampling.sigmas), {})
        program = lower(table, key, sampling)
        for start in range(0, len(self.noise), CHUNK):
            rows = slice(start, start + CHUNK)
            conditions = {name: value[rows] for name, value in self.conditions.items()}
            parts.append(self.evaluator.play(program, self.noise[rows], conditions))
        return self.compare(np.concatenate(parts))

    def compare(self, latents: np.ndarray) -> dict[str, Any]:
        pictures = self.model.decode(latents, self.settings)
        return {
            "psnr": [round(psnr_db(a, b), 3) for a, b in zip(pictures, self.pictures, strict=True)],
            "psnr_fine": [round(psnr_db(a, b), 3) for a, b in zip(pictures, self.fine_pictures, strict=True)],
            "latent_db": round(decibels(relative_errors(latents, self.reference)), 3),
        }


def open_setting(name: str, work: Path, *, steps: int, shift: float | None, num: int) -> Setting:
    """Load the model with a shift, calibrate (or read the calibration), and run the references."""
    spec = find_model("tiny-flux")
    model = load_model(spec)
    if shift is not None:
        scheduler = model.pipeline.scheduler
        model.pipeline.scheduler = scheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, steps, "float32")
    evaluator, subject = GraphEvaluator(prepare(model, settings), model.io), Subject.of(model, settings)
    path = work / f"{name}.safetensors"
    reference_steps = FINE if name == "50 steps" else 0
    if not path.exists():
        prompts = default_prompts("shapes", "train")[: 64 if reference_steps else NUM_FIT]
        parts = work / f"{name}.parts"
        used = UsedPrompts(tuple(prompts), ("fit",) * len(prompts))
        statistics = record_statistics(
            subject, recording_here(subject, evaluator), used, reference_steps=reference_steps, seed=0, work=parts
        )
        save_statistics(statistics, path)
    statistics = load_statistics(path)
    prompts = default_prompts("shapes", "eval")[:num]
    conditions = subject.encode(prompts)
    noise = np.stack([make_noise(seed, tuple(statistics.noise.shape[1:])) for seed in range(num)])
    results = {}
    for count in (steps, FINE):
        sampling = model.sampling(replace(settings, steps=count))
        results[count] = _uncached(evaluator, sampling, noise, conditions, work / f"{name}-{count}-{num}.npy")
    return Setting(
        name, model, settings, open_calibration(statistics, subject, evaluator),
        open_calibration(statistics, subject, evaluator, fine=True) if reference_steps else None,
        evaluator, conditions, noise, results[steps],
        list(model.decode(results[steps], settings)), list(model.decode(results[FINE], settings)),
    )  # fmt: skip


def _uncached(
    evaluator: Evaluator, sampling: Sampling, noise: np.ndarray, conditions: dict[str, np.ndarray], path: Path
) -> np.ndarray:
    if not path.exists():
        parts = []
        for start in range(0, len(noise), CHUNK):
            some = {name: value[start : start + CHUNK] for name, value in conditions.items()}
            *_, last = run_uncached(evaluator, sampling, noise[start : start + CHUNK], some)
            parts.append(last.latents)
        np.save(path, np.concatenate(parts))
    latents: np.ndarray = np.load(path)
    return latents


class Bench:
    """Rows by setting, budget, method and schedule; each is measured once and kept."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def row(self, budget: int, method: str, schedule: str, make: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there. ``make`` gives a table, and what else is worth keeping."""
        key = "|".join((self.setting.name, str(budget), method, schedule))
        if key in self.rows:
            return
        try:
            made = make()
        except InputError as error:  # a published schedule that does not exist at this budget
            self.rows[key] = {"missing": str(error)}
        else:
            table = made.pop("table")
            result = self.setting.measure(table, made.pop("sampling", None))
            steps = list(table.schedule.compute)
            self.rows[key] = {"computed": len(steps), "steps": steps, **made, **result}
            print(f"{key:55s} K={len(steps):2d} {np.mean(result['psnr']):6.2f} dB  {made}", flush=True)
        self.path.write_text(json.dumps(self.rows))


def bench_budget(bench: Bench, budget: int, *, main: bool, closed: bool) -> None:
    """All rows of one budget. ``main``: all methods, BNS and the comparators too; ``closed``: closed-loop searches."""
    setting = bench.setting
    fit = setting.calibration.select(range(NUM_FIT))
    bench_gram(bench, fit, budget, bns=main and closed)
    solvers, caches = (MORE_SOLVERS, MORE_CACHES) if not closed else (SOLVERS, CACHES) if main else (FEW_SOLVERS, FEW_CACHES)
    for name in solvers:
        bench.row(budget, name, "own", lambda n=name: _solver(setting, n, budget))
        if closed or name in MORE_SEARCHED:
            bench.row(budget, name, "searched", lambda n=name: _searched_solver(fit, n, budget, closed=closed))
    for name, (method, options) in CACHES.items():
        if name not in caches:
            continue
        chosen = get_method(method).with_options(options)
        parameters = chosen.calibrate(fit, Schedule(fit.num_steps, (0,))) if chosen.needs_calibration else None
        bench.row(budget, name, "own", lambda m=chosen, p=parameters: _tabled(m, fit, p, m.published(fit.num_steps, budget)))
        if closed or name in MORE_SEARCHED:
            bench.row(budget, name, "searched", lambda m=chosen, p=parameters: _searched(m, fit, p, budget, closed=closed))
    hidden = get_method("gram-hidden").with_options({})
    bench.row(budget, "gram-hidden", "searched", lambda: _searched(hidden, fit, None, budget, closed=closed))
    if main and closed:
        taylor = get_method("taylor").with_options({"order": "1"})
        gram = fit.velocity_gram()
        bench.row(budget, "taylor:1", "CEM", lambda: _tabled(taylor, fit, None, cem_schedule(gram, budget)))
        bench.row(budget, "taylor:1", "LeMiCa", lambda: _tabled(taylor, fit, None, lemica_schedule(gram, fit.sigmas, budget)))


def bench_gram(bench: Bench, fit: Calibration, budget: int, *, bns: bool) -> None:
    """Ours in all forms, and BNS at the same time steps."""
    draft = get_method("gram").with_options({"polish": "0"})
    own = interval_for_budget(fit.num_steps, budget)
    bench.row(budget, "gram", "interval", lambda: {"table": fit_rows(fit, own)})
    bench.row(budget, "gram", "searched", lambda: _searched(draft, fit, None, budget))
    key = f"{bench.setting.name}|{budget}|gram|searched"
    schedule = Schedule(fit.num_steps, tuple(bench.rows[key]["steps"]))
    if budget <= MAX_POLISHED:
        bench.row(budget, "gram polished", "searched", lambda: _timed_fit(get_method("gram").with_options({}), fit, schedule))
    if bns:
        bench.row(budget, "bns", "gram's", lambda: _timed_fit(get_method("bns").with_options({}), fit, schedule))
    if bench.setting.fine is not None and bns:
        bench_fine(bench, budget)


def bench_fine(bench: Bench, budget: int) -> None:
    """Fitted to the fine reference, on its grid."""
    assert bench.setting.fine is not None
    fine = bench.setting.fine.select(range(NUM_FIT))

    def make(method: Method) -> dict[str, Any]:
        made = _searched(method.draft(), fine, None, budget)
        if getattr(method, "polish", 0):
            made = _timed_fit(method, fine, made["table"].schedule)
        return {**made, "sampling": fine.sampling}

    bench.row(budget, "gram", "searched, to fine", lambda: make(get_method("gram").with_options({"polish": "0"})))
    bench.row(budget, "gram polished", "searched, to fine", lambda: make(get_method("gram").with_options({})))


def _tabled(method: Method, fit: Calibration, parameters: Parameters | None, schedule: Schedule) -> dict[str, Any]:
    return {"table": method.table(schedule, fit.sigmas, parameters)}


def _searched(
    method: Method, fit: Calibration, parameters: Parameters | None, budget: int, *, closed: bool = True
) -> dict[str, Any]:
    start = time.perf_counter()
    schedule = search_schedule(method, fit, parameters, budget, seed=0, closed=closed)
    middle = time.perf_counter()
    if method.schedule_bound:
        parameters = method.calibrate(fit, schedule)
    seconds = {"search_s": round(middle - start, 1), "fit_s": round(time.perf_counter() - middle, 1)}
    return {"table": method.table(schedule, fit.sigmas, parameters), **seconds}


def _timed_fit(method: Method, fit: Calibration, schedule: Schedule) -> dict[str, Any]:
    start = time.perf_counter()
    parameters = method.calibrate(fit, schedule)
    seconds = time.perf_counter() - start
    return {"table": method.table(schedule, fit.sigmas, parameters), "fit_s": round(seconds, 1)}


def _solver(setting: Setting, name: str, budget: int) -> dict[str, Any]:
    """A plain solver at its own time steps: the model's sampler with ``budget`` steps."""
    sampling = setting.model.sampling(replace(setting.settings, steps=budget))
    schedule = Schedule(budget, tuple(range(budget)))
    table = AdvanceTable(schedule, solver_rows(name, sampling.sigmas.astype(np.float64)))
    return {"table": table, "sampling": sampling}


def _searched_solver(fit: Calibration, name: str, budget: int, *, closed: bool) -> dict[str, Any]:
    start = time.perf_counter()

    def table(steps: tuple[int, ...]) -> AdvanceTable:
        return AdvanceTable(Schedule(fit.num_steps, steps), solver_rows(name, fit.sigmas[[*steps, -1]]))

    score = solver_score(lambda sigmas: solver_rows(name, sigmas), fit)
    candidates = search_schedules(score, fit.num_steps, budget, seed=0)
    few = few_prompts(fit)
    if not closed:
        return {"table": table(candidates[0]), "search_s": round(time.perf_counter() - start, 1)}
    best = polish_schedule(
        candidates[:FEW_SCHEDULES], lambda s: -decibels(few.errors(table(s))), fit.num_steps, moves=CLOSED_MOVES, seed=0
    )
    return {"table": table(best), "search_s": round(time.perf_counter() - start, 1)}


def bench_lesa(bench: Bench, folder: Path | None) -> None:
    """LESA wherever a trained predictor is at hand: the one that ships, and those in ``folder``."""
    from cachec.compiler.methods.parameters import load_predictor

    setting = bench.setting
    method = get_method("lesa").with_options({})
    for interval in (5, 7, 8, 10):
        schedule = method.interval(setting.num_steps, interval)
        parameters = find_shipped(setting.model, method, schedule, setting.settings)
        path = None if folder is None else folder / f"lesa-{interval}.safetensors"
        if parameters is None and path is not None and path.exists():
            parameters = load_predictor(path)
        if parameters is not None:
            make = lambda p=parameters, s=schedule: _tabled(method, setting.calibration, p, s)  # noqa: E731
            bench.row(len(schedule.compute), "lesa", "own", make)


def bench_prompts(bench: Bench) -> None:
    """How many calibration prompts the closed form and its polish need, on gram's schedule with 8 of 50 steps."""
    key = f"{bench.setting.name}|8|gram|searched"
    schedule = Schedule(bench.setting.num_steps, tuple(bench.rows[key]["steps"]))
    for num in (1, 2, 4, 8, 16, 32, 64):
        some = bench.setting.calibration.select(range(num))
        bench.row(8, "gram", f"{num} prompts", lambda s=some: {"table": fit_rows(s, schedule)})
        if num <= NUM_FIT:
            bench.row(
                8, "gram polished", f"{num} prompts", lambda s=some: {"table": polish(s, fit_rows(s, schedule), rounds=2)}
            )


# by name: setting, steps, shift, evaluation prompts, budgets
PARTS: dict[str, tuple[str, int, float | None, int, tuple[int, ...]]] = {
    "50 steps": ("50 steps", 50, None, 64, FEW_BUDGETS),
    "28 steps": ("28 steps", 28, None, 32, FEW_BUDGETS),
    "shift 1.6": ("shift 1.6", 50, 1.6, 32, FEW_BUDGETS),
    "50 steps, more": ("50 steps", 50, None, 64, MORE_BUDGETS),
}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/quality"), show_default=True)
@click.option("--part", type=click.Choice(list(PARTS)), help="Only this one; several may run side by side.")
@click.option("--lesa", type=click.Path(path_type=Path), help="Folder with lesa-N.safetensors, trained with cachec train.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/quality.json"), show_default=True)
def main(work: Path, part: str | None, lesa: Path | None, out: Path) -> None:
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")
    work.mkdir(parents=True, exist_ok=True)
    for name in PARTS if part is None else [part]:
        setting, steps, shift, num, budgets = PARTS[name]
        first = setting == "50 steps"
        bench = Bench(work / f"rows {name}.json", open_setting(setting, work, steps=steps, shift=shift, num=num))
        for budget in budgets:
            bench_budget(bench, budget, main=first, closed=budgets == FEW_BUDGETS)
        if name == "50 steps":
            bench_lesa(bench, lesa)
            bench_prompts(bench)
            base = bench.setting.compare(bench.setting.reference)
            bench.rows["50 steps|50|uncached|own"] = {"computed": 50, "psnr_fine": base["psnr_fine"]}
            bench.path.write_text(json.dumps(bench.rows))
    merge(work, out)


def merge(work: Path, out: Path) -> None:
    """Join the rows of all settings that were measured."""
    rows: dict[str, Any] = {}
    for path in sorted(work.glob("rows *.json")):
        rows |= json.loads(path.read_text())
    out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
