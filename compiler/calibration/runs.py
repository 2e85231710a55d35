"""Runs of the uncached model, recorded: what fits, training and measurements start from.

Shapes: ``P`` prompts, ``T`` steps, ``L`` tokens, ``D`` channels of the feature; latents [P, …].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from safetensors.numpy import load_file, save
from tqdm import tqdm

from cachec.compiler.calibration.evaluator import Conditions, Evaluator
from cachec.compiler.calibration.workers import Alone, Kept, Team, Tick, Tool, do_pieces
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError
from cachec.runtime.noise import NUM_SEEDS, make_noise
from cachec.runtime.specs import BFLOAT16, Array

CHUNK = 16  # prompts a batch, at most
KEPT_TOKENS = 256  # whose features are kept; of longer sequences they stand for all
MAX_TRAINING_BYTES = 4 << 30  # of features in memory
TRAINING_SEED_BASE = NUM_SEEDS  # training noise has seeds from here on; people's seeds are smaller
EncodedKey = tuple[str, str, int, float, float]
_ENCODED: WeakKeyDictionary[LoadedModel, dict[EncodedKey, Conditions]] = WeakKeyDictionary()  # ahead of runs
SEEDS_A_RUN = 4096  # of training noise, for each seed that a user may choose


@dataclass(frozen=True, eq=False)
class Subject:
    """What is run: a model with its settings, wherever and in whatever it is evaluated: what goes in and comes out is float32.

    ``sampling`` of a number of steps; ``encode`` gives conditions of prompts, by name [P, …]; ``latent_shape`` without batch.
    """

    name: str
    weights_hash: str
    sampler: str
    settings: Settings
    latent_shape: tuple[int, ...]
    sampling: Callable[[int], Sampling]
    encode: Callable[[Sequence[str]], dict[str, Array]]

    @classmethod
    def of(cls, model: LoadedModel, settings: Settings) -> "Subject":
        """A loaded model, which encodes prompts itself.

        Raises:
            InputError: a size is none of the model's.
        """
        settings = replace(settings, dtype="float32")
        return cls(
            name=model.spec.name,
            weights_hash=model.weights_hash,
            sampler=model.sampler,
            settings=settings,
            latent_shape=tuple(model.example_inputs(settings)[model.io.latents].shape[1:]),
            sampling=lambda steps: model.sampling(settings.with_steps(steps)),
            encode=lambda prompts: encode_prompts(model, prompts, settings),
        )

    @property
    def own_sampling(self) -> Sampling:
        """That of the settings' steps."""
        return self.sampling(self.settings.steps)


@dataclass(frozen=True, eq=False)
class RunStep:
    """One step of uncached runs: ``latents`` after it, ``velocity`` and ``feature`` [P, …]."""

    latents: Array
    velocity: Array
    feature: Array


@dataclass(frozen=True, eq=False)
class WantedRun:
    """Run every prompt on these noise levels, and keep what ``keep`` makes of the steps: arrays by name, prompts first."""

    sampling: Sampling
    keep: Callable[[Iterator[RunStep]], dict[str, Array]]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """``noise`` and ``final`` latents [P, …], ``features`` [P, T, N, D] at the cut, ``conditions`` by name [P, …].

    ``tokens`` [N] says of which of the L tokens the features are, in order. Features are float32, or the bits of bfloat16
    (uint16): see :func:`features_kept`.
    """

    noise: Array
    final: Array
    features: Array
    conditions: Conditions
    tokens: Array

    def select(self, index: Array) -> "Trajectories":
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return Trajectories(self.noise[index], self.final[index], self.features[index], conditions, self.tokens)


def features_of(runs: Trajectories) -> Array:
    """The features [P, T, N, D] of recorded runs in float32, whatever they are stored in."""
    if runs.features.dtype != np.uint16:
        return runs.features
    wide: Array = (runs.features.astype(np.uint32) << 16).view(np.float32)
    return wide


def run_uncached(evaluator: Evaluator, sampling: Sampling, noise: Array, conditions: Conditions) -> Iterator[RunStep]:
    """The steps of plain sampling, every one computed, as its sampler takes them."""
    x, velocities = noise, list[Array]()
    for step, t in enumerate(sampling.timesteps):
        velocity, feature = evaluator.evaluate(x, t, {**conditions, **sampling.told_besides(step, len(x))})
        if sampling.euler is None:
            velocities.append(velocity)
            x = sampling.latents(noise, velocities)
        else:
            carry, gain = (x.dtype.type(number[step]) for number in sampling.euler)
            x = carry * x + gain * velocity
        yield RunStep(x, velocity, feature)


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that are run together, from number ``start`` on; ``seeds`` are of their noise, and runs as ``wanted``."""

    start: int
    prompts: Sequence[str]
    seeds: Sequence[int]
    wanted: Sequence[WantedRun]


@dataclass(frozen=True)
class RecorderFacts:
    """What recorders that work together have in common: the model, the kind of device, what it computes in, and how much."""

    weights_hash: str
    device: str
    precision: str
    max_batch: int


class Recorder(Tool[RecorderFacts, Batch, dict[str, Array]]):
    """The uncached model, run on batches of prompts: what each run keeps, and its ``noise``. Ticks once an evaluation."""

    def __init__(self, subject: Subject, evaluator: Evaluator) -> None:
        self._subject, self._evaluator = subject, evaluator

    @property
    def facts(self) -> RecorderFacts:
        one = self._evaluator
        return RecorderFacts(self._subject.weights_hash, DeviceName.parse(one.device).kind, one.precision, one.max_batch)

    def do(self, task: Batch, tick: Tick) -> dict[str, Array]:
        """Run one batch.

        Raises:
            InputError: a run gives NaN or infinity.
        """
        noise = np.stack([make_noise(seed, self._subject.latent_shape) for seed in task.seeds])
        conditions, result = self._subject.encode(task.prompts), {"noise": noise}
        for one in task.wanted:
            steps = run_uncached(self._evaluator, one.sampling, noise, conditions)
            result |= one.keep(_watched(steps, task, tick))
        return result


Recorders = Team[RecorderFacts, Batch, dict[str, Array]]


def recording_here(subject: Subject, evaluator: Evaluator) -> Recorders:
    """This process alone."""
    return Alone(Recorder(subject, evaluator))


def record_runs(
    recorders: Recorders,
    prompts: Sequence[str],
    wanted: Sequence[WantedRun],
    *,
    seeds: Sequence[int],
    chunk: int = CHUNK,
    work: Path | None,
    title: str,
    first: int = 0,
) -> dict[str, Array]:
    """Run the uncached model on every prompt, as often as is ``wanted``; the results of all prompts, and their ``noise``.

    ``seeds`` are those of the prompts' noise. Finished batches of ``chunk`` prompts are kept in ``work``, if given, and not
    made again after an interruption. ``first``: how many other prompts there are before these, in other batches.

    Raises:
        InputError: a run gives NaN or infinity.
        EngineError: all workers died.
    """
    starts = range(0, len(prompts), chunk)
    batches = [Batch(first + at, prompts[at : at + chunk], seeds[at : at + chunk], wanted) for at in starts]
    pieces = {f"runs-{batch.start:04d}.safetensors": batch for batch in batches}
    evaluations, finished = sum(one.sampling.num_steps for one in wanted), 0
    with tqdm(total=len(prompts) * evaluations, desc=title, unit="evaluation", disable=None) as bar:

        def done(name: str) -> None:
            nonlocal finished
            finished += len(pieces[name].prompts) * evaluations
            bar.update(finished - bar.n)

        chunks = do_pieces(recorders, pieces, Kept(work, _content, load_file), tick=bar.update, done=done)
    return {name: np.concatenate([one[name] for one in chunks]) for name in chunks[0]}


def _content(arrays: dict[str, Array]) -> bytes:
    content: bytes = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    return content


def _watched(steps: Iterator[RunStep], batch: Batch, tick: Tick) -> Iterator[RunStep]:
    for number, step in enumerate(steps):
        check_finite(step.velocity, batch.prompts, batch.start, number)
        tick(len(batch.prompts))
        yield step


def training_seeds(seed: int, num: int) -> list[int]:
    """Seeds of the noise that ``num`` prompts are fitted on; ``seed`` is the user's."""
    return [TRAINING_SEED_BASE + (seed * SEEDS_A_RUN + number) % NUM_SEEDS for number in range(num)]


def measuring_seeds(seed: int, num: int) -> list[int]:
    """Seeds of the noise that ``num`` prompts are measured on: counted from the other end, so that no fit saw them."""
    return [TRAINING_SEED_BASE + ((seed + 1) * SEEDS_A_RUN - 1 - number) % NUM_SEEDS for number in range(num)]


def encode_ahead(model: LoadedModel, prompts: Sequence[str], settings: Settings) -> None:
    """Encode what runs will ask for, and let go of the text encoders: gigabytes, where the model itself is about to be put."""
    encoded = encode_prompts(model, prompts, settings)
    known = _ENCODED.setdefault(model, {})
    for place, prompt in enumerate(prompts):
        known[_key(prompt, settings)] = {name: value[place] for name, value in encoded.items()}
    model.release_text_encoders()


def encode_prompts(model: LoadedModel, prompts: Sequence[str], settings: Settings) -> dict[str, Array]:
    """Conditions of any number of prompts, by name [P, …]: those that were encoded ahead, or encoded now."""
    known = _ENCODED.get(model, {})
    if all(_key(prompt, settings) in known for prompt in prompts):
        found = [known[_key(prompt, settings)] for prompt in prompts]
        return {name: np.stack([one[name] for one in found]) for name in found[0]}
    starts = range(0, len(prompts), CHUNK)
    names = model.conditions(settings)
    parts = [model.encode(prompts[start : start + CHUNK], settings, names) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _key(prompt: str, settings: Settings) -> EncodedKey:
    return prompt, settings.size, settings.text_tokens, settings.guidance, settings.true_cfg_scale


def some_tokens(num_tokens: int, wanted: int) -> Array:
    """Which tokens' features are kept, in order: the same for every batch and every run."""
    tokens: Array = np.sort(np.random.default_rng(0).permutation(num_tokens)[:wanted])
    return tokens


def features_kept(num_tokens: int, token_bytes: int, max_bytes: int = MAX_TRAINING_BYTES) -> tuple[int, str]:
    """Of how many of a sequence's tokens features are kept to train on, and in which type.

    ``token_bytes``: what one token takes in float32, of all steps of all runs. Short sequences are kept whole. What is fitted
    has one number a step for all tokens, so that some of them, in bfloat16, stand for the others: the loss is unbiased.
    """
    if num_tokens <= KEPT_TOKENS and num_tokens * token_bytes <= max_bytes:
        return num_tokens, "float32"
    return min(num_tokens, KEPT_TOKENS, max(1, max_bytes // (token_bytes // 2))), BFLOAT16


@dataclass(frozen=True)
class KeepFeatures:
    """Final latents and every step's feature, as :func:`features_kept` says; ``num_features``: prompts times steps."""

    num_features: int
    max_bytes: int

    def __call__(self, steps: Iterator[RunStep]) -> dict[str, Array]:
        features = []
        for step in steps:
            token_bytes = self.num_features * step.feature[0, 0].nbytes
            number, dtype = features_kept(step.feature.shape[1], token_bytes, self.max_bytes)
            tokens = some_tokens(step.feature.shape[1], number)
            features.append(step.feature[:, tokens] if dtype == "float32" else bfloat16_bits(step.feature[:, tokens]))
        final = step.latents
        return {"final": final, "features": np.stack(features, axis=1), "tokens": np.tile(tokens, (len(final), 1))}


def bfloat16_bits(values: Array) -> Array:
    """Float32 numbers as the bits of the nearest bfloat16, ties to even; numpy has no such type."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def record_features(
    subject: Subject,
    recorders: Recorders,
    prompts: Sequence[str],
    *,
    seed: int,
    work: Path,
    max_bytes: int = MAX_TRAINING_BYTES,
) -> dict[str, Array]:
    """Run the uncached model once per prompt, and keep every step's feature. Resumable in ``work``.

    Of long sequences some tokens are kept, and no more than take ``max_bytes`` in all.
    """
    wanted = WantedRun(subject.own_sampling, KeepFeatures(len(prompts) * subject.settings.steps, max_bytes))
    title, seeds = f"uncached runs of {len(prompts)} prompts", training_seeds(seed, len(prompts))
    return record_runs(recorders, prompts, [wanted], seeds=seeds, work=work, title=title)


def keep_states(steps: Iterator[RunStep]) -> dict[str, Array]:
    """The latents after every step."""
    return {"after": np.stack([step.latents for step in steps], axis=1)}


def record_states(subject: Subject, recorders: Recorders, prompts: Sequence[str], *, seed: int, work: Path) -> dict[str, Array]:
    """Run the uncached model once per prompt; ``states`` [P, T, …] are the latents before each step. Resumable in ``work``."""
    title, wanted = f"uncached runs of {len(prompts)} prompts", WantedRun(subject.own_sampling, keep_states)
    runs = record_runs(recorders, prompts, [wanted], seeds=training_seeds(seed, len(prompts)), work=work, title=title)
    return {"states": np.concatenate([runs["noise"][:, None], runs["after"][:, :-1]], axis=1)}


def record_trajectories(
    subject: Subject,
    recorders: Recorders,
    prompts: Sequence[str],
    *,
    seed: int,
    work: Path,
    max_bytes: int = MAX_TRAINING_BYTES,
) -> Trajectories:
    """What :func:`record_features` records, with the prompts' conditions."""
    runs = record_features(subject, recorders, prompts, seed=seed, work=work, max_bytes=max_bytes)
    return Trajectories(runs["noise"], runs["final"], runs["features"], subject.encode(prompts), runs["tokens"][0])


def check_finite(values: Array, prompts: Sequence[str], start: int, step: int) -> None:
    """Raise ``InputError`` naming the prompt and the step if ``values`` [P, …] hold NaN or infinity."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"the model gives NaN or infinity at step {step} for prompt {start + index + 1} ({prompts[index]!r}): "
            "check the weights and the precision, or leave that prompt out"
        )
