"""``cachec eval``: the bundle beside the uncached run, other methods on its schedule, and plain solvers.

All rows have the same prompts, noise and back end. Rows take turns on every prompt, so that a noisy machine is unfair to
none of them.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cachec.compiler.calibration.metrics import Mean, latent_rel_l2, mean, psnr_db, ssim
from cachec.compiler.calibration.solvers import Denoise, euler, unipc
from cachec.compiler.export import plan_engine, plan_engines
from cachec.compiler.methods import get_method
from cachec.compiler.models.base import LoadedModel, Settings, settings_of
from cachec.compiler.pipeline import add_forecast, lower
from cachec.compiler.request import Request
from cachec.compiler.schedule import Schedule
from cachec.compiler.split import canonical_model, split_model
from cachec.engines import get_backend
from cachec.passes import COMPUTE, FORECAST, MODEL, Graphs
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import Program
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array

FINE_STEPS = 200
COMPARED = {"taylor1": ("taylor", {"order": "1"}), "taylor2": ("taylor", {"order": "2"}), "reuse": ("reuse", {})}


@dataclass(frozen=True)
class Sampler:
    """One row of the table: how to get latents from conditions and noise, and how many model evaluations that takes."""

    name: str
    compute_steps: int
    denoise: Denoise


@dataclass
class Measurements:
    """What one row gave, prompt by prompt."""

    psnr: list[float] = field(default_factory=list)
    psnr_fine: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    latent_error: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """The table: one dictionary a row, and what it was measured on."""

    rows: tuple[dict[str, Any], ...]
    setting: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "setting": dict(self.setting)}


def evaluate(loaded: LoadedBundle, model: LoadedModel, prompts: Sequence[str], *, seed: int) -> Evaluation:
    """Measure the bundle on ``prompts``; prompt ``i`` has the noise of seed ``seed + i``.

    Raises:
        InputError: the model's weights are not those that the bundle was compiled from.
    """
    settings, names = settings_of(loaded.manifest), model.io.conditions
    if loaded.programs["default"].key.batch not in (None, 1):
        raise InputError("eval runs one prompt at a time, and this bundle takes larger batches only: compile without --batch")
    if model.weights_hash != loaded.manifest.model["weights_sha256"]:
        raise InputError(
            f"{model.spec.source} has other weights than the bundle was compiled from: pass the right one with --model, "
            "or compile again"
        )
    with _samplers(loaded, model, settings) as (samplers, fine):
        results = {s.name: Measurements() for s in samplers}
        shape = tuple(model.example_inputs(settings)[model.io.latents].shape[1:])
        for sampler in samplers:  # first calls are slow, and would be charged to the rows that come first
            model.decode(sampler.denoise(model.encode(prompts[:1], settings, names), make_noise(seed, shape)[None]), settings)
        for index, prompt in enumerate(tqdm(prompts, desc="evaluating", unit="prompt")):
            noise = make_noise(seed + index, shape)[None]
            _measure_prompt(model, settings, samplers, fine, prompt, noise, results, index)
    rows = tuple(_row(s, results[s.name], results) for s in samplers)
    setting = {
        "prompts": len(prompts),
        "seed": seed,
        "schedule": list(loaded.programs["default"].compute_steps),
        "steps": settings.steps,
        "fine_steps": FINE_STEPS,
        "backend": loaded.manifest.targets[0].backend,
        "method": loaded.manifest.method["name"],
    }
    return Evaluation(rows, setting)


def _measure_prompt(
    model: LoadedModel,
    settings: Settings,
    samplers: Sequence[Sampler],
    fine: Denoise,
    prompt: str,
    noise: Array,
    results: Mapping[str, Measurements],
    turn: int,
) -> None:
    """Run every row on one prompt, beginning with another row each time, then compare."""
    latents: dict[str, Array] = {}
    pictures: dict[str, Array] = {}
    order = [samplers[(turn + i) % len(samplers)] for i in range(len(samplers))]
    for sampler in order:
        start = time.perf_counter()
        conditions = model.encode([prompt], settings, model.io.conditions)
        before = time.perf_counter()
        latents[sampler.name] = sampler.denoise(conditions, noise)
        after = time.perf_counter()
        pictures[sampler.name] = model.decode(latents[sampler.name], settings)[0]
        results[sampler.name].loop_seconds.append(after - before)
        results[sampler.name].total_seconds.append(time.perf_counter() - start)
    reference, reference_picture = latents["uncached"], pictures["uncached"]
    fine_picture = model.decode(fine(model.encode([prompt], settings, model.io.conditions), noise), settings)[0]
    for name, result in results.items():
        result.psnr.append(psnr_db(pictures[name], reference_picture))
        result.psnr_fine.append(psnr_db(pictures[name], fine_picture))
        result.ssim.append(ssim(pictures[name], reference_picture))
        result.latent_error.append(latent_rel_l2(latents[name], reference))


def _row(sampler: Sampler, result: Measurements, results: Mapping[str, Measurements]) -> dict[str, Any]:
    loop = statistics.median(result.loop_seconds)
    psnr, fine = mean(result.psnr), mean(result.psnr_fine)

    def speedup(name: str) -> float:
        return statistics.median(results[name].loop_seconds) / loop

    def rounded(value: float | None, digits: int = 3) -> float | None:
        return None if value is None else round(value, digits)

    def stderr(value: Mean) -> float | None:
        return rounded(value.error)

    return {
        "name": sampler.name,
        "compute_steps": sampler.compute_steps,
        "psnr_db": rounded(psnr.value),
        "psnr_db_stderr": stderr(psnr),
        "psnr_db_fine": rounded(fine.value),
        "psnr_db_fine_stderr": stderr(fine),
        "ssim": round(float(np.mean(result.ssim)), 5),
        "latent_rel_l2": round(float(np.mean(result.latent_error)), 6),
        "seconds_loop": round(loop, 5),
        "seconds_loop_quartiles": [round(float(q), 5) for q in np.percentile(result.loop_seconds, [25, 75])],
        "seconds_total": round(statistics.median(result.total_seconds), 5),
        "speedup_vs_uncached": round(speedup("uncached"), 3),
        "speedup_vs_eager": round(speedup("diffusers"), 3),
    }


@contextmanager
def _samplers(loaded: LoadedBundle, model: LoadedModel, settings: Settings) -> Iterator[tuple[list[Sampler], Denoise]]:
    """All rows, with the engines that they need: the bundle's, and the unsplit model built for the same back end."""
    program = loaded.programs["default"]
    schedule = Schedule(settings.steps, program.compute_steps)
    budget = len(schedule.compute)
    backend = get_backend(loaded.manifest.targets[0].backend)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cachec-eval-")))
        uncached = stack.enter_context(_build_unsplit(model, settings, backend, work))
        context = uncached.context()
        programs, linear = _compared_programs(loaded, model, settings, schedule, backend, work, stack)

        def plain(num_steps: int) -> Denoise:
            return euler(context, model.io, *model.sampling(replace(settings, steps=num_steps)))

        def through(engines: Mapping[str, Engine], one: Program) -> Denoise:
            return Session(engines, one, loaded.io).run

        def diffusers(conditions: Mapping[str, Array], noise: Array) -> Array:
            return model.generate(conditions, noise, settings)

        samplers = [
            Sampler("uncached", settings.steps, plain(settings.steps)),
            Sampler("bundle", budget, through(loaded.engines, program)),
            *(Sampler(name, budget, through(linear, one)) for name, one in programs.items()),
            Sampler("plain", budget, plain(budget)),
            Sampler("unipc", budget, unipc(context, model.io, model.flow_shift(settings), budget)),
            Sampler("diffusers", settings.steps, diffusers),
        ]
        yield samplers, plain(FINE_STEPS)


def _build_unsplit(model: LoadedModel, settings: Settings, backend: Any, work: Path) -> Engine:
    """The whole model as one engine of the back end."""
    inputs = model.example_inputs(settings)
    plan = plan_engine(MODEL, canonical_model(model, settings).modules[MODEL], inputs)
    out = work / "unsplit"
    out.mkdir()
    paths = backend.build({MODEL: plan.program}, {MODEL: plan.signature}, out)
    engine: Engine = backend.load(paths[MODEL], plan.signature)
    return engine


def _compared_programs(
    loaded: LoadedBundle,
    model: LoadedModel,
    settings: Settings,
    schedule: Schedule,
    backend: Any,
    work: Path,
    stack: ExitStack,
) -> tuple[dict[str, Program], Mapping[str, Engine]]:
    """Programs of the compared methods on the bundle's schedule, and the linear engines to run them on."""
    programs: dict[str, Program] = {}
    graphs: Graphs | None = None
    split: Graphs | None = None
    for name, (method, options) in COMPARED.items():
        request = Request(get_method(method).with_options(options), schedule, settings)
        split = split or split_model(model, settings)
        graphs = add_forecast(model, split, request, None)
        programs[name] = lower(model, graphs, request)
    if loaded.manifest.method["fold"] == "static" or graphs is None:
        return programs, loaded.engines
    plans = plan_engines(graphs, model.example_inputs(settings), settings.steps)
    out = work / "linear"
    out.mkdir()
    signatures = {plan.name: plan.signature for plan in plans}
    paths = backend.build({plan.name: plan.program for plan in plans}, signatures, out)
    built = {name: backend.load(paths[name], signatures[name]) for name in (COMPUTE, FORECAST)}
    for engine in built.values():
        stack.enter_context(engine)
    return programs, built
