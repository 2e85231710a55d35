"""Calibration statistics: what uncached runs leave behind for closed-form fits, as a file.

Per prompt, not pooled: cross-validation, standard errors and resuming need them apart.

Shapes: ``P`` prompts, ``T`` steps, ``R`` steps of the fine reference, ``L`` tokens, ``D`` channels; latents [P, …].
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from cachec.compiler.calibration.runs import TRAINING_SEED_BASE, Denoiser
from cachec.compiler.models.base import LoadedModel, Settings, check_prompts, tensors_from
from cachec.passes import Graphs
from cachec.runtime.errors import InputError
from cachec.runtime.files import write_file
from cachec.runtime.noise import NUM_SEEDS, make_noise
from cachec.runtime.program import hash_sigmas
from cachec.runtime.work import claim_work

log = logging.getLogger(__name__)

FORMAT = "cachec-calibration-1"
MIN_PROMPTS = 8
MAX_CHUNK = 16  # prompts a batch
MAX_FEATURE_BYTES = 2**30  # of recorded features in memory; of longer sequences only some tokens are kept


@dataclass(frozen=True, eq=False)
class Statistics:
    """``noise`` [P, …]; ``latents`` [P, T, …] after each step; Gram matrices [P, T, T] of velocities and features, float64.

    ``fine_latents`` [P, R, …] and ``fine_velocity_gram`` [P, R, R] where there is a fine reference. ``facts`` say what they
    are statistics of, ``prompts`` which ones in words.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    velocity_gram: torch.Tensor
    feature_gram: torch.Tensor
    fine_latents: torch.Tensor | None
    fine_velocity_gram: torch.Tensor | None
    prompts: tuple[str, ...]
    facts: Mapping[str, str]
    origin: str


@dataclass(frozen=True)
class Plan:
    """How much a calibration takes: prompts a batch, tokens whose features are kept, bytes of memory and of the file."""

    chunk: int
    feature_tokens: int
    num_tokens: int
    memory_bytes: int
    file_bytes: int
    evaluations: int

    def __str__(self) -> str:
        tokens = "all" if self.feature_tokens == self.num_tokens else f"{self.feature_tokens} of {self.num_tokens}"
        return (
            f"{self.evaluations} model evaluations in batches of {self.chunk}, features of {tokens} tokens, "
            f"{self.memory_bytes / 2**20:.0f} MiB of memory for records, {self.file_bytes / 2**20:.1f} MiB on disk"
        )


def calibration_facts(model: LoadedModel, settings: Settings, reference_steps: int | None) -> dict[str, str]:
    """What statistics must be of, to be used with these settings; ``reference_steps`` ``None``: with any reference."""
    facts = {
        "weights_sha256": model.weights_hash,
        "steps": str(settings.steps),
        "sampler": type(model.pipeline.scheduler).__name__,
        "sigmas": hash_sigmas(model.sampling(settings)[0]),
        **{name: str(getattr(settings, name)) for name in ("height", "width", "text_tokens", "guidance")},
    }
    return facts if reference_steps is None else {**facts, "reference_steps": str(reference_steps)}


def plan_calibration(model: LoadedModel, settings: Settings, feature: torch.Tensor, num: int, reference: int) -> Plan:
    """The plan for ``num`` prompts; ``feature`` [B, L, D] is an example, ``reference`` 0 for no fine reference.

    Raises:
        InputError: there is no prompt, or the fine reference is not finer than the run.
    """
    if num < 1:
        raise InputError(f"num is {num}; calibration needs at least 1 prompt")
    if reference and (reference <= settings.steps or reference % settings.steps):
        raise InputError(
            f"reference-steps is {reference}; it must be a multiple of the {settings.steps} steps, such as {4 * settings.steps}"
        )
    latents = model.example_inputs(settings, batch=2)[model.io.latents]
    num_tokens, channels = feature.shape[1], feature[0, 0].numel()
    token_bytes = settings.steps * channels * 4
    chunk = int(min(MAX_CHUNK, num, max(1, MAX_FEATURE_BYTES // (token_bytes * num_tokens))))
    tokens = int(min(num_tokens, max(1, MAX_FEATURE_BYTES // (token_bytes * chunk))))
    latent_bytes, runs = latents[0].numel() * 4, settings.steps + reference
    features = chunk * tokens * token_bytes + 2 * settings.steps * tokens * channels * 8  # one prompt at a time in float64
    memory = features + num * runs * latent_bytes + 2 * runs * latents[0].numel() * 8 + chunk * runs * latent_bytes
    file = num * ((runs + 1) * latent_bytes + 8 * (2 * settings.steps**2 + reference**2))
    return Plan(chunk, tokens, num_tokens, memory, file, num * runs)


def record_statistics(
    model: LoadedModel,
    split: Graphs,
    settings: Settings,
    prompts: Sequence[str],
    *,
    reference_steps: int,
    seed: int,
    work: Path | None,
) -> Statistics:
    """Run the uncached model once per prompt, and once more with ``reference_steps`` steps if that is not 0.

    Finished batches are kept in ``work``, if given, and not made again after an interruption.

    Raises:
        InputError: a run gives NaN or infinity, or ``work`` holds another calibration.
        OutputError: another process calibrates in ``work``, or it cannot be written.
    """
    check_prompts(prompts)
    settings = replace(settings, dtype="float32")
    with torch.no_grad():
        feature = split.modules["compute"](**model.example_inputs(settings))["feature"]
    plan = plan_calibration(model, settings, feature, len(prompts), reference_steps)
    log.warning("calibration on %d prompts: %s", len(prompts), plan)
    facts = {
        **calibration_facts(model, settings, reference_steps),
        "model": model.spec.name,
        "seed": str(seed),
        "num_prompts": str(len(prompts)),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "prompts": json.dumps(list(prompts)),
        "feature_tokens": str(plan.feature_tokens),
        "format": FORMAT,
    }
    recorder = _Recorder(model, split, settings, plan, reference_steps, seed)
    chunks = []
    claimed = {**facts, "chunk": str(plan.chunk)}  # batches of another size would not line up
    with (
        nullcontext() if work is None else claim_work(work, "calibration", claimed),
        tqdm(total=plan.evaluations, desc="calibrating", unit="evaluation", disable=None) as bar,
    ):
        for start in range(0, len(prompts), plan.chunk):
            path = None if work is None else work / f"runs-{start:04d}.safetensors"
            if path is not None and path.exists():
                chunks.append(load_file(path))
                bar.update(len(chunks[-1]["noise"]) * (settings.steps + reference_steps))
                continue
            chunks.append(recorder.record(prompts[start : start + plan.chunk], start, bar))
            if path is not None:
                write_file(path, save(chunks[-1]))
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return _from_tensors(tensors, facts, "made now")


class _Recorder:
    """Runs batches of prompts and keeps what statistics need."""

    def __init__(
        self, model: LoadedModel, split: Graphs, settings: Settings, plan: Plan, reference_steps: int, seed: int
    ) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        self._runs = {"": Denoiser(model, split, settings)}
        if reference_steps:
            self._runs["fine_"] = Denoiser(model, split, replace(settings, steps=reference_steps))
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randperm(plan.num_tokens, generator=generator)[: plan.feature_tokens].sort().values

    def record(self, prompts: Sequence[str], start: int, bar: "tqdm[Any]") -> dict[str, torch.Tensor]:
        model, settings = self._model, self._settings
        conditions = tensors_from(model.encode(prompts, settings, model.io.conditions))
        shape = tuple(model.example_inputs(settings)[model.io.latents].shape[1:])
        seeds = [TRAINING_SEED_BASE + (self._seed * 4096 + start + i) % NUM_SEEDS for i in range(len(prompts))]
        noise = torch.from_numpy(np.stack([make_noise(seed, shape) for seed in seeds]))
        result = {"noise": noise}
        for prefix, denoiser in self._runs.items():
            x, latents, velocities, features = noise, [], [], []
            for step in range(len(denoiser.sigmas) - 1):
                velocity, feature = denoiser.compute(x, step, conditions)
                check_finite(velocity, prompts, start, step)
                x = denoiser.advance(x, velocity, step)
                latents.append(x)
                velocities.append(velocity)
                if not prefix:
                    features.append(feature[:, self._tokens])
                bar.update(len(prompts))
            result[f"{prefix}latents"] = torch.stack(latents, dim=1)
            result[f"{prefix}velocity_gram"] = gram(velocities)
            if not prefix:
                result["feature_gram"] = gram(features)
        return result


def gram(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products [P, n, n] in float64 of n tensors [P, …], one prompt at a time to bound the memory."""
    products = []
    for index in range(len(tensors[0])):
        rows = torch.stack([t[index].flatten() for t in tensors]).double()
        products.append(rows @ rows.T)
    return torch.stack(products)


def check_finite(values: torch.Tensor, prompts: Sequence[str], start: int, step: int) -> None:
    """Raise ``InputError`` naming the prompt and the step if ``values`` [P, …] hold NaN or infinity."""
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise InputError(
            f"the model gives NaN or infinity at step {step} for prompt {start + index + 1} ({prompts[index]!r}): "
            "check the weights and the precision, or leave that prompt out"
        )


def statistics_bytes(statistics: Statistics) -> bytes:
    """The content of a calibration file."""
    names = ("noise", "latents", "velocity_gram", "feature_gram", "fine_latents", "fine_velocity_gram")
    tensors = {name: getattr(statistics, name) for name in names}
    content: bytes = save({k: v.contiguous() for k, v in tensors.items() if v is not None}, dict(statistics.facts))
    return content


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write a calibration file, atomically.

    Raises:
        OutputError: the place cannot be written.
    """
    write_file(path, statistics_bytes(statistics))


def load_statistics(path: Path) -> Statistics:
    """Read a calibration file.

    Raises:
        InputError: it is missing, damaged, or something else.
    """
    if not path.is_file():
        raise InputError(f"calibration {path} does not exist: make one with cachec calibrate MODEL -o {path}")
    try:
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a calibration file, or is damaged ({error}): run cachec calibrate again") from error
    if facts.get("format") != FORMAT:
        raise InputError(f"{path} is not a calibration file of this cachec ({FORMAT}): make one with cachec calibrate")
    try:
        return _from_tensors(tensors, facts, str(path))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is not a calibration file, or is damaged ({error!r}): run cachec calibrate again") from error


def check_statistics(statistics: Statistics, wanted: Mapping[str, str]) -> None:
    """Raise ``InputError`` unless the statistics are of what is ``wanted`` (facts by name)."""
    reasons = [
        f"{name} is {statistics.facts.get(name, 'unknown')[:40]}, wanted {value[:40]}"
        for name, value in wanted.items()
        if statistics.facts.get(name) != value
    ]
    if reasons:
        raise InputError(
            f"calibration {statistics.origin} is of something else: {'; '.join(reasons)}. "
            "Make one for these settings with cachec calibrate"
        )


def check_calibration_prompts(prompts: Sequence[str]) -> None:
    """Raise ``InputError`` unless there are enough prompts to fit on some and to measure on others."""
    check_prompts(prompts)
    if len(prompts) < MIN_PROMPTS:
        raise InputError(
            f"{len(prompts)} prompts are too few to fit on some and to measure on others: give at least {MIN_PROMPTS}"
        )


def _from_tensors(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str], origin: str) -> Statistics:
    return Statistics(
        noise=tensors["noise"],
        latents=tensors["latents"],
        velocity_gram=tensors["velocity_gram"],
        feature_gram=tensors["feature_gram"],
        fine_latents=tensors.get("fine_latents"),
        fine_velocity_gram=tensors.get("fine_velocity_gram"),
        prompts=tuple(json.loads(facts["prompts"])),
        facts=facts,
        origin=origin,
    )
