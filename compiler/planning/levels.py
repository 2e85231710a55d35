"""How good and how fast the levels of a bundle are, measured with its own engines on held-out calibration prompts."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.calibration.metrics import Mean, mean, psnr_db
from cachec.compiler.calibration.statistics import check_finite
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.lower import lower_table
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.engine import Engine
from cachec.runtime.errors import QualityError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import Session
from cachec.runtime.specs import Array, TensorSpec

log = logging.getLogger(__name__)

TIMED_PROMPTS = 3


def measure_levels(
    model: LoadedModel,
    settings: Settings,
    engines: Mapping[str, Engine],
    programs: Mapping[str, Program],
    held_out: Calibration,
) -> dict[str, dict[str, Any]]:
    """Facts by level: PSNR in dB against the uncached float32 run and, if there is one, the fine reference; loop speed-up.

    ``held_out``: prompts that no fit saw. ``programs`` include the uncached one.
    """
    statistics, index = held_out.statistics, held_out.index
    references = {"psnr_db": statistics.latents[index, -1]}
    if statistics.fine_latents is not None:
        references["psnr_db_fine"] = statistics.fine_latents[index, -1]
    wanted = {name: list(model.decode(latents.numpy(), settings)) for name, latents in references.items()}
    conditions = {name: value.numpy() for name, value in held_out.all_conditions().items()}
    noise, seconds, facts = held_out.noise().numpy(), dict[str, list[float]](), {}
    for level, program in programs.items():
        batch = program.key.batch or 1
        session = Session(engines, program, model.io, batch=batch)
        session.run({name: value[[0] * batch] for name, value in conditions.items()}, noise[[0] * batch])  # warm up
        scores: dict[str, list[float]] = {name: [] for name in references}
        seconds[level] = []
        for number in range(len(noise) if level != UNCACHED else min(TIMED_PROMPTS, len(noise))):
            rows = [number] * batch
            start = time.perf_counter()
            latents = session.run({name: value[rows] for name, value in conditions.items()}, noise[rows])
            seconds[level].append(time.perf_counter() - start)
            check_finite(torch.from_numpy(latents[:1]), [statistics.prompts[int(index[number])]], number, program.num_steps)
            picture = model.decode(latents[:1], settings)[0]
            for name, pictures in wanted.items():
                scores[name].append(psnr_db(picture, pictures[number]))
        facts[level] = {"num_prompts": len(scores["psnr_db"]), **_means(scores)}
    slow = float(np.median(seconds[UNCACHED]))
    for level, known in facts.items():
        known["speedup"] = round(slow / float(np.median(seconds[level])), 2)
        log.info("level %s: %s", level, known)
    return {level: known for level, known in facts.items() if level != UNCACHED}


def forecast_cost(engines: Mapping[str, Engine], program: Program, model: LoadedModel) -> float:
    """The time of a forecast over that of a computed step, medians, 1 at most; 0 without a forecast engine.

    ``program`` is the uncached one.
    """
    if "forecast" not in engines:
        return 0.0
    half, batch = program.num_steps // 2, program.key.batch or 1
    if not half:
        return 0.0
    table = ForecastTable(Schedule(program.num_steps, tuple(range(half))), *_last_feature(program.num_steps, half))
    session = Session(engines, lower_table(table, program.key, program.sigmas, program.timesteps), model.io, batch=batch)
    conditions = {name: np.zeros(s.resolve({"batch": batch}), s.dtype) for name, s in _conditions(engines, model.io).items()}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2):  # the first round warms up
        session.begin(conditions, np.zeros(session.latent_shape, np.float32))
        seconds = {True: [], False: []}
        for instruction in session.program.instructions:
            start = time.perf_counter()
            session.advance()
            engines["compute"].device.synchronize()
            spent = (time.perf_counter() - start) / len(instruction.steps)
            seconds[instruction.computes].append(spent)
    return min(1.0, float(np.median(seconds[False]) / np.median(seconds[True])))


def _last_feature(num_steps: int, computed: int) -> tuple[Array, Array]:
    """Coefficients [T, K] and bias [T] of reuse."""
    coefficients = np.zeros((num_steps, computed))
    coefficients[computed:, -1] = 1.0
    return coefficients, np.zeros(num_steps)


def _conditions(engines: Mapping[str, Engine], io: ModelIO) -> dict[str, TensorSpec]:
    specs = {spec.name: spec for engine in engines.values() for spec in engine.signature.inputs}
    return {name: specs[name] for name in io.conditions if name in specs}


def _means(scores: Mapping[str, list[float]]) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, values in scores.items():
        average: Mean = mean(values)
        result[name] = None if average.value is None else round(average.value, 3)
        result[f"{name}_stderr"] = None if average.error is None else round(average.error, 3)
    return result


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
