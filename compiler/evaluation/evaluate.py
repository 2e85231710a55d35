"""``cachec eval``: every level of a bundle beside the uncached run, other methods on its schedule, and plain solvers.

All rows have the same prompts, noise and back end, and but for diffusers' own loop all are programs that a session plays.
Rows take turns on every prompt, so that a noisy machine is unfair to none of them.

Shapes: ``T`` steps, ``H``, ``W`` pixels.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from cachec.compiler.calibration.metrics import Lpips, find_lpips, latent_rel_l2, psnr_db, ssim
from cachec.compiler.evaluation.comparisons import (
    Row,
    compared_level,
    compared_rows,
    level_rows,
    parse_against,
    sampler_program,
)
from cachec.compiler.evaluation.error_by_step import ErrorCurve, measure_errors
from cachec.compiler.evaluation.probe import SIDE, Probe, load_probe, parse_caption, score_pictures
from cachec.compiler.evaluation.summary import Measured, summarize
from cachec.compiler.models.base import LoadedModel, Settings, settings_of
from cachec.compiler.planning.goals import DIFFUSERS
from cachec.runtime.errors import InputError
from cachec.runtime.files import temporary_folder
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array

FINE_STEPS = 200
PAUSE = 0.02  # seconds; text encoder, back end and VAE have threads of their own, which spin for some milliseconds after a call
Conditions = Mapping[str, Array]
Denoise = Callable[[Conditions, Array], Array]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a report shows of a row for one prompt: its picture [H, W, 3], dB against the uncached one, loop seconds."""

    picture: Array
    psnr_db: float
    seconds: float


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """A prompt whose pictures were kept, by row; ``fine`` is of many steps."""

    prompt: str
    seed: int
    rows: Mapping[str, Shown]
    fine: Shown


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The table: one dictionary a row, and what it was measured on.

    ``programs`` by row; ``kept`` and ``errors`` (by row) only if pictures were asked for.
    """

    rows: tuple[dict[str, Any], ...]
    setting: Mapping[str, Any]
    programs: Mapping[str, Program] = field(default_factory=dict)
    kept: tuple[KeptPrompt, ...] = ()
    errors: Mapping[str, ErrorCurve] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "setting": dict(self.setting)}


@dataclass(frozen=True, eq=False)
class _Bench:
    """Everything that one prompt is measured with."""

    model: LoadedModel
    settings: Settings
    denoisers: Mapping[str, Denoise]
    fine: Denoise
    lpips: Lpips
    probe: Probe | None

    def shape(self) -> tuple[int, ...]:
        return tuple(self.model.example_inputs(self.settings)[self.model.io.latents].shape[1:])

    def encode(self, prompt: str) -> dict[str, Array]:
        return self.model.encode([prompt], self.settings, self.model.io.conditions)

    def decode(self, latents: Array) -> Array:
        picture: Array = self.model.decode(latents, self.settings)[0]
        return picture


def evaluate(
    loaded: LoadedBundle,
    model: LoadedModel,
    prompts: Sequence[str],
    *,
    seed: int,
    against: str,
    level: str | None = None,
    keep_pictures: int = 0,
) -> Evaluation:
    """Measure the bundle on ``prompts``; prompt ``i`` has the noise of seed ``seed + i``.

    ``against`` names what to compare with (see :func:`parse_against`), at the number of computed steps of ``level``. The
    pictures of the first ``keep_pictures`` prompts are kept, and their error by step is measured.

    Raises:
        InputError: the model's weights are not those that the bundle was compiled from, or an entry cannot be compared.
    """
    _check_fit(loaded, model)
    level, entries = compared_level(loaded, level), parse_against(against)
    with ExitStack() as stack:
        work = stack.enter_context(temporary_folder())
        rows = [*level_rows(loaded), *compared_rows(entries, loaded, model, level=level, work=work, stack=stack)]
        bench = _make_bench(loaded, model, rows)
        measured: dict[str, list[Measured]] = {name: [] for name in bench.denoisers}
        _warm_up(bench, prompts[0], seed)
        kept = []
        for index, prompt in enumerate(tqdm(prompts, desc="evaluating", unit="prompt")):
            found, shown = _measure_prompt(bench, prompt, seed + index, turn=index)
            for name, one in found.items():
                measured[name].append(one)
            if index < keep_pictures:
                kept.append(shown)
        runs = [(bench.encode(one.prompt), make_noise(one.seed, bench.shape())[None]) for one in kept]
        sessions = {row.name: row.session(loaded) for row in rows if runs}
        errors = measure_errors(sessions.pop(UNCACHED), sessions, runs) if runs else {}
    kinds = {**{row.name: row.kind for row in rows}, DIFFUSERS: DIFFUSERS}
    computed = {**{row.name: len(row.program.compute_steps) for row in rows}, DIFFUSERS: bench.settings.steps}
    loops = {name: statistics.median(one.loop_seconds for one in measured[name]) for name in measured}
    table = tuple(summarize(name, kinds[name], computed[name], measured[name], loops) for name in measured)
    programs = {row.name: row.program for row in rows}
    setting = _setting(loaded, bench, prompts, seed=seed, level=level)
    return Evaluation(table, setting, programs, tuple(kept), errors)


def _check_fit(loaded: LoadedBundle, model: LoadedModel) -> None:
    if any(program.key.batch not in (None, 1) for program in loaded.programs.values()):
        raise InputError("eval runs one prompt at a time, and this bundle takes larger batches only: compile without --batch")
    if model.weights_hash != loaded.manifest.model["weights_sha256"]:
        raise InputError(
            f"{model.spec.source} has other weights than the bundle was compiled from: pass the right one with --model, "
            "or compile again"
        )


def _make_bench(loaded: LoadedBundle, model: LoadedModel, rows: Sequence[Row]) -> _Bench:
    settings = settings_of(loaded.manifest)

    def diffusers(conditions: Conditions, noise: Array) -> Array:
        return model.generate(conditions, noise, settings)

    denoisers: dict[str, Denoise] = {row.name: row.session(loaded).run for row in rows}
    fine = sampler_program(model, settings, rows[0].program.key, FINE_STEPS)
    return _Bench(
        model=model,
        settings=settings,
        denoisers={**denoisers, DIFFUSERS: diffusers},
        fine=Session(loaded.engines, fine, loaded.io).run,
        lpips=find_lpips(),
        probe=load_probe(model.spec.probe) if model.spec.probe and settings.height == settings.width == SIDE else None,
    )


def _warm_up(bench: _Bench, prompt: str, seed: int) -> None:
    """First calls are slow, and would be charged to the rows that come first."""
    noise = make_noise(seed, bench.shape())[None]
    for denoise in bench.denoisers.values():
        bench.decode(denoise(bench.encode(prompt), noise))


def _measure_prompt(bench: _Bench, prompt: str, seed: int, *, turn: int) -> tuple[dict[str, Measured], KeptPrompt]:
    """Run every row on one prompt, beginning with another row each time, then compare."""
    noise = make_noise(seed, bench.shape())[None]
    names = list(bench.denoisers)
    runs = {name: _run(bench, name, prompt, noise) for name in (names[(turn + i) % len(names)] for i in range(len(names)))}
    for name, run in runs.items():
        if not np.isfinite(run.latents).all():
            raise InputError(f"row {name} gives NaN or infinity for prompt {prompt!r}, seed {seed}: leave that row out")
    fine = _run(bench, None, prompt, noise)
    measured = {name: _compare(bench, prompt, runs[name], runs[UNCACHED], fine.picture) for name in names}
    shown = {name: Shown(runs[name].picture, one.psnr_db, one.loop_seconds) for name, one in measured.items()}
    fine_shown = Shown(fine.picture, psnr_db(fine.picture, runs[UNCACHED].picture), fine.loop_seconds)
    return measured, KeptPrompt(prompt, seed, shown, fine_shown)


@dataclass(frozen=True, eq=False)
class _Run:
    """A request: latents [1, …], picture [H, W, 3], seconds of the loop and of everything."""

    latents: Array
    picture: Array
    loop_seconds: float
    total_seconds: float


def _run(bench: _Bench, name: str | None, prompt: str, noise: Array) -> _Run:
    """A request of a row, or of the fine run (``None``)."""
    conditions, encoding = _timed(bench.encode, prompt)
    latents, loop = _timed(bench.fine if name is None else bench.denoisers[name], conditions, noise)
    picture, decoding = _timed(bench.decode, latents)
    return _Run(latents, picture, loop, encoding + loop + decoding)


def _timed(run: Callable[..., Array | Conditions], *given: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    result = run(*given)
    return result, time.perf_counter() - start


def _compare(bench: _Bench, prompt: str, run: _Run, uncached: _Run, fine: Array) -> Measured:
    score = None if bench.probe is None else score_pictures(bench.probe, run.picture[None], [prompt])
    return Measured(
        psnr_db=psnr_db(run.picture, uncached.picture),
        psnr_db_fine=psnr_db(run.picture, fine),
        ssim=ssim(run.picture, uncached.picture),
        latent_error=latent_rel_l2(run.latents, uncached.latents),
        loop_seconds=run.loop_seconds,
        total_seconds=run.total_seconds,
        lpips=bench.lpips.distance(run.picture, uncached.picture),
        attributes={} if score is None else score.accuracy,
        num_items=0 if score is None else score.num_items,
    )


def _setting(loaded: LoadedBundle, bench: _Bench, prompts: Sequence[str], *, seed: int, level: str) -> dict[str, Any]:
    program = loaded.programs[level]
    asked = [len(items) for items in map(parse_caption, prompts) if items is not None]
    probed = {"items": sum(asked), "prompts_skipped": len(prompts) - len(asked)} if bench.probe is not None else None
    return {
        "prompts": len(prompts),
        "seed": seed,
        "level": level,
        "schedule": list(program.compute_steps),
        "schedule_steps": program.num_steps,
        "steps": bench.settings.steps,
        "fine_steps": FINE_STEPS,
        "backend": loaded.target.backend,
        "method": loaded.manifest.method["name"],
        "lpips": "available" if bench.lpips.network is not None else f"not available: {bench.lpips.reason}",
        "probe": probed,
    }
