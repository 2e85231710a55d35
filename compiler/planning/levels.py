"""How good and how fast the levels of a bundle are, measured with its own engines on prompts of their own."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.metrics import Decode, latent_rel_l2, psnr_db, ssim, summarize_metric
from cachec.compiler.calibration.runs import check_finite
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.lower import lower_table
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import BATCH, COMPUTE, FORECAST
from cachec.runtime.engine import Engine
from cachec.runtime.errors import QualityError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import Session
from cachec.runtime.specs import Array, TensorSpec

log = logging.getLogger(__name__)

TIMED_PROMPTS = 3


def measure_levels(
    decode: Decode | None,
    evaluator: Evaluator,
    programs: Mapping[str, Program],
    measured: Calibration,
) -> dict[str, dict[str, Any]]:
    """Facts by level, against the uncached float32 run: PSNR and SSIM of pictures, relative error of latents; loop speed-up.

    ``psnr_db_fine`` is against the fine reference, where there is one; without ``decode`` nothing is of pictures.
    ``evaluator`` is of the bundle's own engines, ``measured`` are prompts that nothing was fitted to or chosen by.
    ``programs`` include the uncached one.

    Raises:
        InputError: a run gives NaN or infinity.
    """
    statistics, index = measured.statistics, measured.index
    references = {"psnr_db": statistics.latents[index, -1]}
    if statistics.fine_latents is not None:
        references["psnr_db_fine"] = statistics.fine_latents[index, -1]
    wanted = {} if decode is None else {name: list(decode(latents)) for name, latents in references.items()}
    seconds, facts = dict[str, list[float]](), dict[str, dict[str, Any]]()
    for level, program in programs.items():
        runs = _timed_runs(evaluator, program, measured, most=TIMED_PROMPTS if level == UNCACHED else None)
        seconds[level] = [spent for _, spent in runs]
        if level == UNCACHED:
            continue
        scores = defaultdict[str, list[float]](list)
        for number, (latents, _) in enumerate(runs):
            if decode is not None:
                picture = decode(latents)[0]
                for name, pictures in wanted.items():
                    scores[name].append(psnr_db(picture, pictures[number]))
                scores["ssim"].append(ssim(picture, wanted["psnr_db"][number]))
            scores["latent_error"].append(latent_rel_l2(latents[0], references["psnr_db"][number]))
        facts[level] = {"num_prompts": len(runs)}
        for name, values in scores.items():
            facts[level] |= summarize_metric(name, values)
    slow = float(np.median(seconds[UNCACHED]))
    for level, known in facts.items():
        known["speedup"] = round(slow / float(np.median(seconds[level])), 2)
        log.info("level %s: %s", level, known)
    return facts


def _timed_runs(evaluator: Evaluator, program: Program, measured: Calibration, most: int | None) -> list[tuple[Array, float]]:
    """Latents [1, …] of the first ``most`` prompts, one at a time, and the seconds of each loop; one more run warms up."""
    noise, conditions, batch = measured.noise()[:most], measured.all_conditions(), program.key.batch or 1
    runs = []
    for number in (0, *range(len(noise))):
        rows = [number] * batch
        given = {name: value[rows] for name, value in conditions.items()}
        start = time.perf_counter()
        latents = evaluator.play(program, noise[rows], given)
        runs.append((latents[:1], time.perf_counter() - start))
        prompt = measured.statistics.prompts.prompts[int(measured.index[number])]
        check_finite(latents[:1], [prompt], number, program.num_steps)
    return runs[1:]


def forecast_cost(engines: Mapping[str, Engine], program: Program, io: ModelIO) -> float:
    """The time of a forecast over that of a computed step, medians, 1 at most; 0 without a forecast engine.

    ``program`` is the uncached one.
    """
    if FORECAST not in engines:
        return 0.0
    half, batch = program.num_steps // 2, program.key.batch or 1
    if not half:
        return 0.0
    table = ForecastTable.of_rows(Schedule(program.num_steps, tuple(range(half))), _last_feature(program.num_steps, half))
    plain = lower_table(
        table, replace(program.key, guided=False), Sampling(program.sigmas, program.timesteps, targets=program.target_timesteps)
    )
    session = Session(engines, plain, io, batch=batch)
    conditions = {name: np.zeros(s.resolve({BATCH: batch}), s.dtype) for name, s in _conditions(engines, io).items()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2):  # the first round warms up
        session.begin(conditions, np.zeros(session.latent_shape, np.float32))
        seconds = {True: [], False: []}
        for instruction in session.program.instructions:
            start = time.perf_counter()
            session.advance()
            engines[COMPUTE].device.synchronize()
            spent = (time.perf_counter() - start) / len(instruction.steps)
            seconds[instruction.computes].append(spent)
    return min(1.0, float(np.median(seconds[False]) / np.median(seconds[True])))


def _last_feature(num_steps: int, computed: int) -> Array:
    """Rows [T, K] of reuse."""
    coefficients = np.zeros((num_steps, computed))
    coefficients[computed:, -1] = 1.0
    return coefficients


def _conditions(engines: Mapping[str, Engine], io: ModelIO) -> dict[str, TensorSpec]:
    specs = {spec.name: spec for engine in engines.values() for spec in engine.signature.inputs}
    return {name: specs[name] for name in io.conditions if name in specs}


def check_quality(facts: Mapping[str, Mapping[str, Any]], min_psnr: float | None) -> None:
    """The gate of ``--min-psnr``.

    Raises:
        QualityError: a level is below; says by how much.
    """
    if min_psnr is None:
        return
    for level, known in facts.items():
        reached = known["psnr_db"]  # None: equal to the uncached run
        if reached is not None and reached < min_psnr:
            raise QualityError(
                f"level {level} reaches {reached:.2f} dB on {known['num_prompts']} held-out prompts, "
                f"{min_psnr - reached:.2f} dB below --min-psnr {min_psnr:g}: compute more steps, take another method, "
                "or lower the gate"
            )
