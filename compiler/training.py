"""Training a predictor: record the uncached model, fit, and write down all facts."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cachec.compiler.calibration.trajectories import Denoiser, record_trajectories
from cachec.compiler.methods.base import Method, Parameters, TrainingData
from cachec.compiler.models.base import LoadedModel, Settings, check_prompts
from cachec.compiler.schedule import Schedule
from cachec.passes import Graphs
from cachec.runtime.errors import InputError
from cachec.runtime.program import hash_sigmas

log = logging.getLogger(__name__)

HELD_OUT_EVERY = 4  # every fourth prompt is kept from training and tells when to stop
MIN_PROMPTS = 8


def training_facts(model: LoadedModel, method: Method, schedule: Schedule, settings: Settings) -> dict[str, str]:
    """What a predictor must have been trained for to be used with these settings."""
    return {
        "method": method.name,
        "weights_sha256": model.weights_hash,
        "steps": str(settings.steps),
        "schedule": ",".join(map(str, schedule.compute)),
        "sigmas": hash_sigmas(model.sampling(settings)[0]),
    }


def train_predictor(
    model: LoadedModel,
    split: Graphs,
    method: Method,
    schedule: Schedule,
    settings: Settings,
    *,
    prompts: Sequence[str],
    seed: int,
    interval: int | None,
    work: Path,
) -> Parameters:
    """Train ``method`` for one model, schedule and number of steps. Work files go to ``work``; a rerun goes on from them.

    Raises:
        InputError: there are too few prompts.
    """
    check_prompts(prompts)
    if len(prompts) < MIN_PROMPTS:
        raise InputError(f"{len(prompts)} prompts are too few to train and to hold some out: give at least {MIN_PROMPTS}")
    start = time.perf_counter()
    denoiser = Denoiser(model, split, settings)
    runs = record_trajectories(model, denoiser, settings, prompts, seed=seed, work=work)
    held_out = torch.arange(len(prompts)) % HELD_OUT_EVERY == 0
    data = TrainingData(
        denoiser, runs.select(torch.where(~held_out)[0]), runs.select(torch.where(held_out)[0]), schedule, seed, work
    )
    tensors, facts = method.fit(data)
    facts = {
        **training_facts(model, method, schedule, settings),
        **{name: str(value) for name, value in vars(settings).items()},
        **facts,
        "model": model.spec.name,
        "interval": "none" if interval is None else str(interval),
        "seed": str(seed),
        "num_prompts": str(len(prompts)),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seconds": f"{time.perf_counter() - start:.0f}",
        "torch": str(torch.__version__),
    }
    return Parameters(tensors, {name: _text(value) for name, value in facts.items()}, "trained now")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
