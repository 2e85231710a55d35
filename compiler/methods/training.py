"""Training a predictor: record the uncached model, fit, and write down all facts."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cachec.compiler.calibration.runs import Denoiser, record_trajectories
from cachec.compiler.graphs.prepare import split_model
from cachec.compiler.methods.base import Method, Parameters, PredictorMethod, TrainingData
from cachec.compiler.models.base import LoadedModel, Settings, check_prompts
from cachec.compiler.request import Request
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.program import hash_sigmas
from cachec.runtime.work import claim_work

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
        **{name: str(getattr(settings, name)) for name in ("height", "width", "text_tokens", "guidance")},
    }


def train_predictor(model: LoadedModel, request: Request, *, work: Path) -> Parameters:
    """Train the request's method for its schedule, in float32 whatever the bundle's precision.

    Work files go to ``work``; a rerun goes on from them.

    Raises:
        InputError: there are too few prompts, nothing to forecast, or ``work`` holds another training.
        OutputError: another process trains in ``work``, or it cannot be written.
    """
    method, prompts, seed = request.method, request.prompts, request.seed
    schedule = request.schedule
    if schedule is None or not isinstance(method, PredictorMethod):
        raise PredictorError(f"method {method.name!r} has nothing to train on one schedule: compile it as it is")
    settings = replace(request.settings, dtype="float32")
    check_training_prompts(prompts)
    if not schedule.forecast:
        raise InputError(f"all {settings.steps} steps are computed: there is nothing to forecast, so nothing to train")
    facts_of_run = {**training_facts(model, method, schedule, settings), "options": json.dumps(method.options())}
    with claim_work(work, "training", {**facts_of_run, "prompts": _hash(prompts), "seed": str(seed)}):
        denoiser = Denoiser(model, split_model(model, settings), settings)
        runs = record_trajectories(model, denoiser, settings, prompts, seed=seed, work=work)
        held_out = torch.arange(len(prompts)) % HELD_OUT_EVERY == 0
        data = TrainingData(
            denoiser, runs.select(torch.where(~held_out)[0]), runs.select(torch.where(held_out)[0]), schedule, seed, work
        )
        tensors, facts = method.fit(data)
    facts = {
        **training_facts(model, method, schedule, settings),
        **facts,
        "options": json.dumps(method.options()),
        "model": model.spec.name,
        "interval": "none" if request.interval is None else str(request.interval),
        "seed": str(seed),
        "num_prompts": str(len(prompts)),
        "prompts_sha256": _hash(prompts),
        "made_by": f"cachec {importlib.metadata.version('cachec')}",
        "torch": str(torch.__version__),
    }
    return Parameters(tensors, {name: _text(value) for name, value in facts.items()}, "trained now")


def check_training_prompts(prompts: Sequence[str]) -> None:
    """Raise ``InputError`` unless there are enough prompts to train on some and hold out others."""
    check_prompts(prompts)
    if len(prompts) < MIN_PROMPTS:
        raise InputError(f"{len(prompts)} prompts are too few to train and to hold some out: give at least {MIN_PROMPTS}")


def _hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
