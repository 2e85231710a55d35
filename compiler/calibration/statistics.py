"""Calibration statistics: what uncached runs leave behind for fits, searches and measurements, as a file.

Per prompt, not pooled: cross-validation, standard errors and resuming need them apart.

Shapes: ``P`` prompts, the first ``W`` of them with their whole runs, the others to choose schedules by; ``T`` steps, ``R``
steps of the fine reference, ``L`` tokens, ``D`` channels; latents [P, …].
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.facts_file import FactsFile
from cachec.compiler.calibration.runs import (
    CHUNK,
    KEPT_TOKENS,
    Batch,
    Recorders,
    RunStep,
    Subject,
    WantedRun,
    measuring_seeds,
    record_runs,
    some_tokens,
    training_seeds,
)
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.models.base import Settings
from cachec.runtime.abi import MAX_BATCH
from cachec.runtime.errors import InputError
from cachec.runtime.files import write_file
from cachec.runtime.program import hash_sigmas
from cachec.runtime.room import bytes_in, check_disk, check_memory, in_bytes
from cachec.runtime.specs import Array
from cachec.runtime.work import claim_work

log = logging.getLogger(__name__)

FILE = FactsFile("calibration", "cachec-calibration-2", "cachec calibrate", InputError)
ARRAYS = ("noise", "latents", "velocity_gram", "feature_gram", "fine_latents", "fine_velocity_gram", "final", "fine_final")
MAX_FEATURE_BYTES = 2**30  # of recorded features in memory; of longer sequences only some tokens are kept


@dataclass(frozen=True, eq=False)
class Statistics:
    """``noise`` [P, …]; ``latents`` [W, T, …] after each step; Gram matrices [W, T, T] of velocities and features, float64.

    ``fine_latents`` [W, R, …] and ``fine_velocity_gram`` [W, R, R] where there is a fine reference; ``final`` and
    ``fine_final`` [P - W, …] where there are prompts to choose by. ``facts`` say what they are statistics of, ``prompts``
    which ones in words, and what each is for.
    """

    noise: Array
    latents: Array
    velocity_gram: Array
    feature_gram: Array
    fine_latents: Array | None
    fine_velocity_gram: Array | None
    prompts: UsedPrompts
    facts: Mapping[str, str]
    origin: str
    final: Array | None = None
    fine_final: Array | None = None

    def ends(self, *, fine: bool) -> Array:
        """Where the runs of all prompts end [P, …], those of the fine reference or of the sampler's own steps."""
        whole, rest = (self.fine_latents, self.fine_final) if fine else (self.latents, self.final)
        assert whole is not None
        last: Array = whole[:, -1]
        return last if rest is None else np.concatenate([last, rest])


@dataclass(frozen=True)
class CalibrationCost:
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
            f"{in_bytes(self.memory_bytes)} of memory for records, {in_bytes(self.file_bytes)} on disk"
        )


def calibration_facts(subject: Subject, reference_steps: int | None, *, precision: str = "float32") -> dict[str, str]:
    """What statistics must be of, to be used with these settings.

    ``reference_steps`` ``None``: with any reference. ``precision``: what the model computed in.
    """
    facts = {
        "precision": precision,
        "weights_sha256": subject.weights_hash,
        "steps": str(subject.settings.steps),
        "sampler": subject.sampler,
        "sigmas": hash_sigmas(subject.own_sampling.sigmas),
        **subject.settings.facts,
        **({"cut": subject.settings.cut} if subject.settings.cut else {}),
    }
    return facts if reference_steps is None else {**facts, "reference_steps": str(reference_steps)}


def check_reference(steps: int, reference: int) -> None:
    """Raise ``InputError`` unless a fine reference of so many steps meets every step of the run; 0 is none."""
    if reference and (reference <= steps or reference % steps):
        raise InputError(f"reference-steps is {reference}; it must be a multiple of the {steps} steps, such as {4 * steps}")


def calibration_cost(
    latents: tuple[int, ...],
    feature: tuple[int, ...],
    settings: Settings,
    num: int,
    reference: int,
    *,
    max_batch: int = MAX_BATCH,
    choosing: int = 0,
) -> CalibrationCost:
    """The cost of ``num`` prompts whose latents and features [L, D] have these shapes; ``reference`` 0: no fine one.

    ``max_batch``: that the model takes. ``choosing``: so many more prompts, of which only noise and final latents are kept.

    Raises:
        InputError: the fine reference is not finer than the run.
    """
    check_reference(settings.steps, reference)
    num_tokens, channels = feature[0], math.prod(feature[1:])
    token_bytes = settings.steps * channels * 4
    most = min(num_tokens, KEPT_TOKENS)
    chunk = int(min(CHUNK, max_batch, num, max(1, MAX_FEATURE_BYTES // (token_bytes * most))))
    tokens = int(min(most, max(1, MAX_FEATURE_BYTES // (token_bytes * chunk))))
    size, runs = math.prod(latents), settings.steps + reference
    features = chunk * tokens * token_bytes + 2 * settings.steps * tokens * channels * 8  # one prompt at a time in float64
    memory = features + num * runs * size * 4 + 2 * runs * size * 8 + chunk * runs * size * 4
    file = num * ((runs + 1) * size * 4 + 8 * (2 * settings.steps**2 + reference**2))
    ends = choosing * size * 4 * (3 if reference else 2)
    return CalibrationCost(chunk, tokens, num_tokens, memory + ends, file + ends, (num + choosing) * runs)


def check_room(cost: CalibrationCost, work: Path | None) -> None:
    """Is there room for the records in memory, and on the disk of ``work``, where they lie in batches beside the whole file?

    Raises:
        OutputError: the disk is too full.
        EngineError: there is too little memory.
    """
    check_memory(cost.memory_bytes, "recording the calibration", "take fewer prompts or steps, or a machine with more")
    if work is not None:
        check_disk(work, 2 * cost.file_bytes - bytes_in(work), "the calibration", "take fewer prompts, or another place")


def record_statistics(
    subject: Subject,
    recorders: Recorders,
    prompts: UsedPrompts,
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
        EngineError: all workers died, or theirs is another model.
    """
    of, num, whole = recorders.facts, len(prompts.prompts), prompts.num_whole
    feature = _feature_shape(subject, recorders, prompts.prompts[0])
    cost = calibration_cost(
        subject.latent_shape, feature, subject.settings, whole, reference_steps, max_batch=of.max_batch, choosing=num - whole
    )
    log.warning("calibration on %d prompts: %s", num, cost)
    check_room(cost, work)
    facts = {
        **calibration_facts(subject, reference_steps, precision=of.precision),
        "device": of.device,
        "model": subject.name,
        "seed": str(seed),
        **prompts.facts,
        "feature_tokens": str(cost.feature_tokens),
        "format": FILE.format,
    }
    runs = [WantedRun(subject.own_sampling, KeepGrams(some_tokens(cost.num_tokens, cost.feature_tokens)))]
    ends = [WantedRun(subject.own_sampling, KeepEnd("final"))]
    if reference_steps:
        runs.append(WantedRun(subject.sampling(reference_steps), keep_fine))
        ends.append(WantedRun(subject.sampling(reference_steps), KeepEnd("fine_final")))
    seeds = _seeds(prompts, seed)
    claimed = {**facts, "chunk": str(cost.chunk)}  # batches of another size would not line up
    with nullcontext() if work is None else claim_work(work, "calibration", claimed):
        arrays = record_runs(
            recorders, prompts.prompts[:whole], runs,
            seeds=seeds[:whole], chunk=cost.chunk, work=work, title="calibrating",
        )  # fmt: skip
        if whole < num:
            rest = record_runs(
                recorders, prompts.prompts[whole:], ends,
                seeds=seeds[whole:], chunk=cost.chunk, work=work, title="runs to choose by", first=whole,
            )  # fmt: skip
            arrays |= {**rest, "noise": np.concatenate([arrays["noise"], rest["noise"]])}
    return _from_arrays(arrays, facts, "made now")


def _feature_shape(subject: Subject, recorders: Recorders, prompt: str) -> tuple[int, ...]:
    """Shape [L, D] of one prompt's feature, after one step."""
    own = subject.own_sampling
    look = WantedRun(own.first(1), keep_shape)
    ((_, found),) = recorders.do([Batch(0, (prompt,), (0,), (look,))])
    return tuple(map(int, found["shape"]))


def keep_shape(steps: Iterator[RunStep]) -> dict[str, Array]:
    """The shape of one feature."""
    (step,) = steps
    return {"shape": np.array(step.feature.shape[1:])}


def _seeds(prompts: UsedPrompts, seed: int) -> list[int]:
    """Noise for every prompt; that of the prompts to measure on is of no fit."""
    measured = set(prompts.places("measure"))
    fitting, measuring = (iter(seeds(seed, len(prompts.prompts))) for seeds in (training_seeds, measuring_seeds))
    return [next(measuring if place in measured else fitting) for place in range(len(prompts.prompts))]


@dataclass(frozen=True, eq=False)
class KeepGrams:
    """Latents and inner products of a run, of features those of some ``tokens``."""

    tokens: Array

    def __call__(self, steps: Iterator[RunStep]) -> dict[str, Array]:
        run = [(step.latents, step.velocity, step.feature[:, self.tokens]) for step in steps]
        latents, velocities, features = zip(*run, strict=True)
        return {
            "latents": np.stack(latents, axis=1),
            "velocity_gram": gram(velocities),
            "feature_gram": gram(features),
        }


def keep_fine(steps: Iterator[RunStep]) -> dict[str, Array]:
    """Latents and inner products of velocities of the fine reference."""
    latents, velocities = zip(*((step.latents, step.velocity) for step in steps), strict=True)
    return {"fine_latents": np.stack(latents, axis=1), "fine_velocity_gram": gram(velocities)}


@dataclass(frozen=True)
class KeepEnd:
    """Final latents, as ``name``."""

    name: str

    def __call__(self, steps: Iterator[RunStep]) -> dict[str, Array]:
        for step in steps:
            last = step.latents
        return {self.name: last}


def gram(arrays: Sequence[Array]) -> Array:
    """Inner products [P, n, n] in float64 of n arrays [P, …], one prompt at a time to bound the memory."""
    products = []
    for index in range(len(arrays[0])):
        rows = np.stack([array[index].ravel() for array in arrays]).astype(np.float64)
        products.append(rows @ rows.T)
    return np.stack(products)


def statistics_bytes(statistics: Statistics) -> bytes:
    """The content of a calibration file."""
    arrays = {name: value for name in ARRAYS if (value := getattr(statistics, name)) is not None}
    return FILE.content(arrays, statistics.facts)


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
    arrays, facts = FILE.read(path)
    try:
        return _from_arrays(arrays, facts, str(path))
    except (KeyError, ValueError, TypeError) as error:
        raise FILE.damaged(path, error) from error


def check_statistics(statistics: Statistics, wanted: Mapping[str, str]) -> None:
    """Raise ``InputError`` unless the statistics are of what is ``wanted`` (facts by name)."""
    FILE.check(statistics.facts, wanted, statistics.origin)


def _from_arrays(arrays: Mapping[str, Array], facts: Mapping[str, str], origin: str) -> Statistics:
    return Statistics(
        noise=arrays["noise"],
        latents=arrays["latents"],
        velocity_gram=arrays["velocity_gram"],
        feature_gram=arrays["feature_gram"],
        fine_latents=arrays.get("fine_latents"),
        fine_velocity_gram=arrays.get("fine_velocity_gram"),
        prompts=UsedPrompts.from_facts(facts),
        facts=facts,
        origin=origin,
        final=arrays.get("final"),
        fine_final=arrays.get("fine_final"),
    )
