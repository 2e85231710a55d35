"""What the quality bench measures on: a model at its settings, captions, uncached runs; and rows, each measured once and kept.

Shapes: ``P`` prompts; latents [P, …]; a picture is [H, W, 3], or a video [F, H, W, 3].
"""

import hashlib
import io
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachec.compiler.calibration.calibration import Calibration, open_calibration, relative_errors
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.metrics import psnr_db, ssim
from cachec.compiler.calibration.prompts import default_prompts, has_prompts
from cachec.compiler.calibration.runs import Subject, check_finite, recording_here, run_uncached
from cachec.compiler.calibration.statistics import Statistics, load_statistics, record_statistics, save_statistics
from cachec.compiler.calibration.uses import Use, UsedPrompts
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.methods.base import Method
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models import load_model
from cachec.compiler.models.base import LoadedModel, ModelSpec, Settings
from cachec.compiler.tables.coefficients import Table
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import CachecError, InputError
from cachec.runtime.files import write_file
from cachec.runtime.noise import make_noise
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array

NUM_FIT, NUM_CHOOSE, NUM_EVAL = 32, 96, 128
CHUNK = 16  # captions at once, on the CPU; a GPU takes them all


@dataclass(frozen=True)
class Extent:
    """How many captions rows are measured on, fitted to, and choose schedules by; ``brief``: trainings of a few updates."""

    captions: int = NUM_EVAL
    fit: int = NUM_FIT
    choose: int = NUM_CHOOSE
    brief: bool = False

    @property
    def facts(self) -> dict[str, int | bool]:
        return {"captions": self.captions, **({"fit": self.fit, "choose": self.choose, "brief": True} if self.brief else {})}


LOOK = Extent(captions=4, fit=8, choose=0, brief=True)


class AbsentError(CachecError):
    """A file that a row needs is not there; the message says which command makes it."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model at its settings: what fits may see (``calibration``), and what rows are measured on, which no fit sees.

    ``reference`` [P, …] are the uncached run's latents from ``noise`` [P, …] under ``conditions``; ``work`` has what is made
    on the way.
    """

    model: LoadedModel
    settings: Settings
    calibration: Calibration
    captions: tuple[str, ...]
    conditions: Mapping[str, Array]
    noise: Array
    reference: Array
    work: Path
    extent: Extent

    @property
    def name(self) -> str:
        return self.model.spec.name

    @property
    def num_steps(self) -> int:
        return self.settings.steps

    @property
    def evaluator(self) -> Evaluator:
        return self.calibration.evaluator

    @property
    def device(self) -> DeviceName:
        return DeviceName.parse(self.evaluator.device)

    def evaluator_with(self, method: Method, parameters: Parameters | None) -> Evaluator:
        """One that plays Programs which keep features in the method's code."""
        return evaluator_of(self.model, self.settings, self.device, method=method, parameters=parameters)

    @property
    def fit(self) -> Calibration:
        """The prompts to fit on."""
        return self.calibration.of("fit")

    @cached_property
    def guided(self) -> bool:
        return self.model.is_guided(self.settings)

    @cached_property
    def pictures(self) -> Array:
        """Those of the uncached run [P, …], decoded once and kept in ``work``."""
        path = self.work / f"pictures-{decoder_hash(self.model)}.npy"
        if not path.exists():
            save_array(path, self.decode(self.reference))
        pictures: Array = np.load(path)
        return pictures

    def decode(self, latents: Array) -> Array:
        """Pictures [P, …] of latents [P, …]."""
        size = chunk(self.evaluator)
        with lent(self.model.decoder, self.device):
            return np.concatenate(
                [self.model.decode(latents[at : at + size], self.settings) for at in range(0, len(latents), size)]
            )

    def sampling(self, steps: int) -> Sampling:
        return self.model.sampling(self.settings.with_steps(steps))

    def key(self, sampling: Sampling) -> ProgramKey:
        return ProgramKey(sampling.num_steps, hash_sigmas(sampling.sigmas), {}, guided=self.guided)

    def program(self, table: Table, sampling: Sampling | None = None) -> Program:
        """A table as a Program, on the own grid unless told."""
        sampling = sampling or self.calibration.sampling
        return lower(table, self.key(sampling), sampling)

    def play(self, program: Program, evaluator: Evaluator | None = None, *, num: int | None = None) -> Array:
        """Final latents [P, …] of a Program, of the first ``num`` captions or all.

        Raises:
            InputError: they are not finite.
        """
        parts, num, size = [], num or len(self.noise), chunk(self.evaluator)
        for at in range(0, num, size):
            rows = slice(at, min(at + size, num))
            conditions = {name: value[rows] for name, value in self.conditions.items()}
            parts.append((evaluator or self.evaluator).play(program, self.noise[rows], conditions))
            check_finite(parts[-1], self.captions[rows], at, program.num_steps)
        return np.concatenate(parts)

    def measure(self, program: Program, evaluator: Evaluator | None = None) -> dict[str, Any]:
        """A row: errors caption by caption. ``work`` is what is computed, in runs of the model."""
        steps = [int(step) for step in program.compute_steps]
        return {"computed": len(steps), "work": program.work, "steps": steps, **self.compare(self.play(program, evaluator))}

    def compare(self, latents: Array, pictures: Array | None = None) -> dict[str, Any]:
        """PSNR in dB, SSIM and relative errors of latents [P, …], each a list; ``pictures``: theirs, if they are decoded."""
        found: dict[str, list[float]] = {"psnr": [], "ssim": []}
        pictures = self.decode(latents) if pictures is None else pictures
        for picture, reference in zip(pictures, self.pictures, strict=True):
            found["psnr"].append(round(psnr_db(picture, reference), 3))
            found["ssim"].append(round(ssim(picture, reference), 6))
        return {**found, "latent": [float(f"{one:.4g}") for one in relative_errors(latents, self.reference)]}


def chunk(evaluator: Evaluator) -> int:
    """Captions at once."""
    return CHUNK if evaluator.device == CPU else NUM_EVAL


@contextmanager
def lent(modules: Any, device: DeviceName) -> Iterator[None]:
    """A module, or all of a pipeline's, on ``device`` inside, and back on the host, where models are captured, behind."""
    modules.to(str(device))
    try:
        yield
    finally:
        modules.to(CPU)


def open_model(spec: ModelSpec, **changes: Any) -> tuple[LoadedModel, Settings]:
    """A model and its usual settings, but for ``changes``."""
    model = load_model(spec)
    quicken(model)
    return model, replace(usual_settings(spec), **changes)


def quicken(model: LoadedModel) -> None:
    """Channels last in the decoder, which the convolutions of a CPU read faster."""
    for module in () if model.decoder is None else model.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def usual_settings(spec: ModelSpec) -> Settings:
    """A model's own, in float32."""
    return Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, spec.steps, "float32", frames=spec.frames)


def open_setting(model: LoadedModel, settings: Settings, work: Path, extent: Extent, device: DeviceName = HOST) -> Setting:
    """Calibrate and run the references, or read what there is of them in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    subject, evaluator = Subject.of(model, settings), evaluator_of(model, settings, device)
    statistics = calibrate(subject, evaluator, usual_prompts(model.spec, extent), work / "calibration")
    captions = tuple(default_prompts(model.spec.prompts, "eval")[: extent.captions])
    conditions = subject.encode(captions)
    noise = np.stack([make_noise(seed, subject.latent_shape) for seed in range(len(captions))])
    reference = uncached_latents(subject, evaluator, noise, conditions, work / "reference")
    calibration = open_calibration(statistics, subject, evaluator)
    return Setting(model, settings, calibration, captions, conditions, noise, reference, work, extent)


def usual_prompts(spec: ModelSpec, extent: Extent) -> UsedPrompts:
    """Of the list to train by those to fit on; those to choose schedules by, where there are any."""
    fit = default_prompts(spec.prompts, "train")[: extent.fit]
    choose = default_prompts(spec.prompts, "choose")[: extent.choose] if has_prompts(spec.prompts, "choose") else []
    uses: list[Use] = ["fit" if place < len(fit) else "choose" for place in range(len(fit) + len(choose))]
    return UsedPrompts((*fit, *choose), tuple(uses))


def calibrate(subject: Subject, evaluator: Evaluator, prompts: UsedPrompts, path: Path, *, seed: int = 0) -> Statistics:
    """Uncached runs of the ``prompts``, or those that lie at ``path``."""
    whole = path.with_name(f"{path.name}.safetensors")
    if not whole.exists():
        recorders = recording_here(subject, evaluator)
        made = record_statistics(
            subject, recorders, prompts, reference_steps=0, seed=seed, work=path.with_name(f"{path.name}.parts")
        )
        save_statistics(made, whole)
    return load_statistics(whole)


def uncached_latents(
    subject: Subject, evaluator: Evaluator, noise: Array, conditions: Mapping[str, Array], folder: Path
) -> Array:
    """Where uncached runs end [P, …]; read from ``folder`` as far as they lie there."""
    folder.mkdir(exist_ok=True)
    parts, size = [], chunk(evaluator)
    for at in range(0, len(noise), size):
        path = folder / f"{at:04d}.npy"
        if not path.exists():
            some = {name: value[at : at + size] for name, value in conditions.items()}
            *_, last = run_uncached(evaluator, subject.own_sampling, noise[at : at + size], some)
            save_array(path, last.latents)
        parts.append(np.load(path))
    return np.concatenate(parts)


def decoder_hash(model: LoadedModel) -> str:
    """Of the decoder's weights: the hash of a model's is of its transformer alone, and pictures are of both."""
    digest = hashlib.sha256()
    for name, value in ({} if model.decoder is None else model.decoder.state_dict()).items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_array(path: Path, values: Array) -> None:
    """Write an array, whole or not at all."""
    content = io.BytesIO()
    np.save(content, values)
    write_file(path, content.getbuffer())


class Rows:
    """Rows by part, budget, method and schedule, in a file; each is measured once and kept.

    ``facts`` say what they are of; a file of others is refused. ``failed``: what broke off with an error that nobody foresaw,
    which is told, and is no reason not to go on with the rest.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], device: DeviceName = HOST) -> None:
        self.path, self.facts = path, dict(facts)
        self._device = CPU if device.kind == CPU else torch.cuda.get_device_name(device.index)
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["facts"] != self.facts:
                raise InputError(f"{path} holds rows of {content['facts']}, and these are of {self.facts}: use another --work")
            self.rows = content["rows"]
        self._made, self.failed = _commit(), list[str]()

    @contextmanager
    def guarding(self, what: str) -> Iterator[None]:
        """Tell what goes wrong inside, remember it, and go on behind."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"{what}: FAILED, see above", file=sys.stderr, flush=True)
            self.failed.append(what)

    def measure(self, part: str, budget: int | str, method: str, schedule: str, make: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there.

        What does not exist, or does not stay finite, is kept with the reason. What lacks a file is tried again next time.
        """
        key = "|".join((part, str(budget), method, schedule))
        if key in self.rows and not self.rows[key].get("absent"):
            return
        with self.guarding(key):
            self._measure(key, make)

    def _measure(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            row = make()
        except AbsentError as error:
            row = {"missing": str(error), "absent": True}
        except CachecError as error:
            row = {"missing": str(error)}
        seconds = round(time.process_time() - cpu, 1)
        self.rows[key] = {**row, "seconds": seconds, "made": self._made, "device": self._device}
        self.save()
        psnr = np.array(row.get("psnr", [np.nan]))
        told = (
            f"{psnr.mean():6.2f} dB, p5 {np.percentile(psnr, 5):5.1f}, worst {psnr.min():5.1f}"
            if "psnr" in row
            else row.get("missing", "counted")
        )
        print(f"{key:50s} {told}  [{seconds:.0f} s of processor, {time.perf_counter() - wall:.0f} s]", flush=True)

    def steps(self, part: str, budget: int | str, method: str, schedule: str) -> tuple[int, ...] | None:
        """The computed steps of a row that there is."""
        row = self.rows.get("|".join((part, str(budget), method, schedule)), {})
        return tuple(row["steps"]) if "steps" in row else None

    def drop(self, part: str, budget: int | str, method: str, schedule: str) -> None:
        """Forget a row, if it is there."""
        self.rows.pop("|".join((part, str(budget), method, schedule)), None)

    def forget(self, methods: Sequence[str]) -> None:
        """Drop the rows of these methods, as they are called before a colon or a comma: to be measured again."""
        wanted = {key for key in self.rows if key.split("|")[2].replace(",", ":").split(":")[0] in methods}
        self.rows = {key: row for key, row in self.rows.items() if key not in wanted}
        self.save()

    def save(self) -> None:
        write_file(self.path, json.dumps({"facts": self.facts, "rows": self.rows}).encode())


def _commit() -> str:
    """Of the sources that measure; as the working tree is, said to be changed."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{' and changes' if changed else ''}"
