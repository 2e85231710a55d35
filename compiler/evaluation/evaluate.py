"""``cachec eval``: every level of a bundle beside the uncached run, other methods on its schedule, and plain solvers.

All rows have the same prompts, noise and back end, and but for diffusers' own loop all are programs that a session plays.
Rows take turns on every prompt, so that a noisy machine is unfair to none of them.

Shapes: ``T`` steps, ``H``, ``W`` pixels.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
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
from cachec.compiler.evaluation.summary import Measurements, summarize
from cachec.compiler.models.base import LoadedModel, Settings, settings_of
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array

FINE_STEPS = 200
FINE, DIFFUSERS = "fine", "diffusers"
Denoise = Callable[[Mapping[str, Array], Array], Array]


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """What a report shows of one prompt: pictures [H, W, 3], dB against the uncached one and loop seconds, by row."""

    prompt: str
    seed: int
    pictures: Mapping[str, Array]
    psnr: Mapping[str, float]
    seconds: Mapping[str, float]


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
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cachec-eval-")))
        rows = [*level_rows(loaded), *compared_rows(entries, loaded, model, level=level, work=work, stack=stack)]
        bench = _make_bench(loaded, model, rows)
        results = {name: Measurements() for name in bench.denoisers}
        _warm_up(bench, prompts[0], seed)
        kept = []
        for index, prompt in enumerate(tqdm(prompts, desc="evaluating", unit="prompt")):
            one = _measure_prompt(bench, prompt, seed + index, results, turn=index)
            if index < keep_pictures:
                kept.append(one)
        runs = [(bench.encode(one.prompt), make_noise(one.seed, bench.shape())[None]) for one in kept]
        sessions = {row.name: row.session(loaded) for row in rows if runs}
        errors = measure_errors(sessions.pop(UNCACHED), sessions, runs) if runs else {}
    kinds = {**{row.name: row.kind for row in rows}, DIFFUSERS: DIFFUSERS}
    computed = {**{row.name: len(row.program.compute_steps) for row in rows}, DIFFUSERS: bench.settings.steps}
    table = tuple(summarize(name, kinds[name], computed[name], results) for name in results)
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

    def diffusers(conditions: Mapping[str, Array], noise: Array) -> Array:
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


def _measure_prompt(bench: _Bench, prompt: str, seed: int, results: Mapping[str, Measurements], *, turn: int) -> KeptPrompt:
    """Run every row on one prompt, beginning with another row each time, then compare."""
    noise = make_noise(seed, bench.shape())[None]
    latents: dict[str, Array] = {}
    pictures: dict[str, Array] = {}
    names = list(bench.denoisers)
    for name in (names[(turn + i) % len(names)] for i in range(len(names))):
        start = time.perf_counter()
        conditions = bench.encode(prompt)
        before = time.perf_counter()
        latents[name] = bench.denoisers[name](conditions, noise)
        after = time.perf_counter()
        if not np.isfinite(latents[name]).all():
            raise InputError(f"row {name} gives NaN or infinity for prompt {prompt!r}, seed {seed}: leave that row out")
        pictures[name] = bench.decode(latents[name])
        results[name].loop_seconds.append(after - before)
        results[name].total_seconds.append(time.perf_counter() - start)
    conditions = bench.encode(prompt)
    before = time.perf_counter()
    fine_latents = bench.fine(conditions, noise)
    fine_seconds, fine = time.perf_counter() - before, bench.decode(fine_latents)
    for name, result in results.items():
        result.latent_error.append(latent_rel_l2(latents[name], latents[UNCACHED]))
        _compare_pictures(bench, prompt, pictures[name], pictures[UNCACHED], fine, result)
    psnr = {**{name: results[name].psnr[-1] for name in names}, FINE: psnr_db(fine, pictures[UNCACHED])}
    seconds = {**{name: results[name].loop_seconds[-1] for name in names}, FINE: fine_seconds}
    return KeptPrompt(prompt, seed, {name: pictures[name] for name in names} | {FINE: fine}, psnr, seconds)


def _compare_pictures(bench: _Bench, prompt: str, picture: Array, reference: Array, fine: Array, result: Measurements) -> None:
    result.psnr.append(psnr_db(picture, reference))
    result.psnr_fine.append(psnr_db(picture, fine))
    result.ssim.append(ssim(picture, reference))
    distance = bench.lpips.distance(picture, reference)
    if distance is not None:
        result.lpips.append(distance)
    if bench.probe is not None:
        score = score_pictures(bench.probe, picture[None], [prompt])
        for name, accuracy in score.accuracy.items():
            result.attributes.setdefault(name, []).extend([accuracy] * score.num_items)


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
