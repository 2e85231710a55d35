"""The bench of ``cachec eval``: every row on one prompt, with the same noise and back end.

But for diffusers' own loop all rows are programs that a session plays. They take turns on every prompt, so that a noisy
machine is unfair to none of them. One bench measures all prompts, or several in processes of their own some prompts each.

Shapes: ``H``, ``W`` pixels.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cachec.compiler.calibration.metrics import find_lpips, latent_rel_l2, psnr_db, ssim
from cachec.compiler.calibration.workers import Tick, Tool
from cachec.compiler.evaluation.comparisons import (
    Row,
    compared_level,
    compared_rows,
    level_rows,
    parse_against,
    sampler_program,
)
from cachec.compiler.evaluation.error_by_step import ErrorCurve, measure_errors
from cachec.compiler.evaluation.probe import CaptionWords, load_probe
from cachec.compiler.evaluation.summary import Measured
from cachec.compiler.models.base import LoadedModel, settings_of
from cachec.compiler.models.lora_files import as_option
from cachec.compiler.planning.goals import DIFFUSERS
from cachec.runtime.abi import COMPUTE
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError
from cachec.runtime.files import temporary_folder
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array

FINE_STEPS = 200
PAUSE = 0.02  # seconds; text encoder, back end and VAE have threads of their own, which spin for some milliseconds after a call
Conditions = Mapping[str, Array]
Denoise = Callable[[Conditions, Array], Array]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a report shows of a row for one prompt: its picture [H, W, 3], dB against the uncached one, loop seconds."""

    picture: Array
    psnr_db: float
    seconds: float


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """A prompt whose pictures were kept, by row; ``fine`` is of many steps."""

    prompt: str
    seed: int
    rows: Mapping[str, Shown]
    fine: Shown


@dataclass(frozen=True)
class PromptTask:
    """The prompt of number ``index`` and the seed of its noise; ``show``: its pictures are wanted, too."""

    index: int
    prompt: str
    seed: int
    show: bool = False


@dataclass(frozen=True, eq=False)
class PromptResult:
    """What was measured, by row, and the pictures if they were wanted."""

    rows: Mapping[str, Measured]
    shown: KeptPrompt | None = None

    def content(self) -> bytes:
        """A file of it, without pictures."""
        return json.dumps({name: vars(one) for name, one in self.rows.items()}).encode()

    @classmethod
    def read(cls, path: Path) -> "PromptResult":
        """Such a file."""
        return cls({name: Measured(**one) for name, one in json.loads(path.read_bytes()).items()})


@dataclass(frozen=True)
class RowFacts:
    """A row: its name, its kind, and how many steps it computes."""

    name: str
    kind: str
    computed: int


@dataclass(frozen=True)
class BenchFacts:
    """What benches that measure together have in common. ``words``: pictures are read for what captions state by these."""

    rows: tuple[RowFacts, ...]
    setting: Mapping[str, Any]
    device: str
    words: CaptionWords | None


class Bench(Tool[BenchFacts, PromptTask, PromptResult]):
    """Everything that one prompt is measured with. Open one with :func:`open_bench`."""

    def __init__(self, loaded: LoadedBundle, model: LoadedModel, rows: Sequence[Row], level: str) -> None:
        self.settings = settings_of(loaded.manifest)
        self._loaded, self._model, self._rows, self._level = loaded, model, rows, level
        self.denoisers: dict[str, Denoise] = {row.name: row.session(loaded).run for row in rows}
        self.denoisers[DIFFUSERS] = self._diffusers
        fine = sampler_program(model, self.settings, rows[0].program.key, FINE_STEPS)
        self.fine: Denoise = Session(loaded.engines, fine, loaded.io).run
        self.lpips = find_lpips()
        reader = load_probe(model.spec.probe) if model.spec.probe else None
        fits = reader is not None and self.settings.height == self.settings.width == reader.probe.side
        self.reader = reader if fits else None
        self._warm = False

    @property
    def facts(self) -> BenchFacts:
        rows = tuple(RowFacts(row.name, row.kind, len(row.program.compute_steps)) for row in self._rows)
        program = self._loaded.programs[self._level]
        setting = {
            "level": self._level,
            "schedule": list(program.compute_steps),
            "schedule_steps": program.num_steps,
            "size": self.settings.size,
            "steps": self.settings.steps,
            "fine_steps": FINE_STEPS,
            "backend": self._loaded.target.backend,
            "method": self._loaded.manifest.method["name"],
            "lpips": "available" if self.lpips.network is not None else f"not available: {self.lpips.reason}",
        }
        device = DeviceName.parse(self._loaded.engines[COMPUTE].device.name).kind
        own = RowFacts(DIFFUSERS, DIFFUSERS, self.settings.steps)
        return BenchFacts((*rows, own), setting, device, None if self.reader is None else self.reader.words)

    @property
    def programs(self) -> dict[str, Program]:
        """By row."""
        return {row.name: row.program for row in self._rows}

    def do(self, task: PromptTask, tick: Tick) -> PromptResult:
        """Measure one prompt.

        Raises:
            InputError: a row gives NaN or infinity.
        """
        if not self._warm:
            self._warm_up(task)
        rows, shown = _measure_prompt(self, task)
        return PromptResult(rows, shown if task.show else None)

    def errors(self, kept: Sequence[KeptPrompt]) -> dict[str, ErrorCurve]:
        """The errors by step on these prompts, by row."""
        runs = [(self.encode(one.prompt), make_noise(one.seed, self.shape())[None]) for one in kept]
        sessions = {row.name: row.session(self._loaded) for row in self._rows if runs}
        return measure_errors(sessions.pop(UNCACHED), sessions, runs) if runs else {}

    def shape(self) -> tuple[int, ...]:
        return tuple(self._model.example_inputs(self.settings)[self._model.io.latents].shape[1:])

    def encode(self, prompt: str) -> dict[str, Array]:
        return self._model.encode([prompt], self.settings, self._model.conditions(self.settings))

    def decode(self, latents: Array) -> Array:
        picture: Array = self._model.decode(latents, self.settings)[0]
        return picture

    def _diffusers(self, conditions: Conditions, noise: Array) -> Array:
        return self._model.generate(conditions, noise, self.settings)

    def _warm_up(self, task: PromptTask) -> None:
        """First calls are slow, and would be charged to the rows that come first."""
        noise = make_noise(task.seed, self.shape())[None]
        for denoise in self.denoisers.values():
            self.decode(denoise(self.encode(task.prompt), noise))
        self._warm = True


@contextmanager
def open_bench(loaded: LoadedBundle, model: LoadedModel, *, against: str, level: str | None) -> Iterator[Bench]:
    """A bench of a bundle's levels and of what ``against`` names, at the number of computed steps of ``level``.

    Raises:
        InputError: the model's weights are not those that the bundle was compiled from, or an entry cannot be compared.
    """
    _check_fit(loaded, model)
    level, entries = compared_level(loaded, level), parse_against(against)
    with ExitStack() as stack:
        work = stack.enter_context(temporary_folder())
        rows = [*level_rows(loaded), *compared_rows(entries, loaded, model, level=level, work=work, stack=stack)]
        yield Bench(loaded, model, rows, level)


def _check_fit(loaded: LoadedBundle, model: LoadedModel) -> None:
    if any(program.key.batch not in (None, 1) for program in loaded.programs.values()):
        raise InputError("eval runs one prompt at a time, and this bundle takes larger batches only: compile without --batch")
    if model.weights_hash != loaded.manifest.model["weights_sha256"]:
        raise InputError(
            f"{model.spec.source} has other weights than the bundle was compiled from: pass the right one with --model"
            + "".join(f", and --lora {as_option(one)}" for one in loaded.manifest.model.get("loras", ()))
            + ", or compile again"
        )


def _measure_prompt(bench: Bench, task: PromptTask) -> tuple[dict[str, Measured], KeptPrompt]:
    """Run every row on one prompt, beginning with another row each time, then compare."""
    prompt, seed, turn = task.prompt, task.seed, task.index
    noise = make_noise(seed, bench.shape())[None]
    names = list(bench.denoisers)
    runs = {name: _run(bench, name, prompt, noise) for name in (names[(turn + i) % len(names)] for i in range(len(names)))}
    for name, run in runs.items():
        if not np.isfinite(run.latents).all():
            raise InputError(f"row {name} gives NaN or infinity for prompt {prompt!r}, seed {seed}: leave that row out")
    fine = _run(bench, None, prompt, noise)
    measured = {name: _compare(bench, prompt, runs[name], runs[UNCACHED], fine.picture) for name in names}
    shown = {name: Shown(runs[name].picture, one.psnr_db, one.loop_seconds) for name, one in measured.items()}
    fine_shown = Shown(fine.picture, psnr_db(fine.picture, runs[UNCACHED].picture), fine.loop_seconds)
    return measured, KeptPrompt(prompt, seed, shown, fine_shown)


@dataclass(frozen=True, eq=False)
class _Run:
    """A request: latents [1, …], picture [H, W, 3], seconds of the loop and of everything."""

    latents: Array
    picture: Array
    loop_seconds: float
    total_seconds: float


def _run(bench: Bench, name: str | None, prompt: str, noise: Array) -> _Run:
    """A request of a row, or of the fine run (``None``)."""
    conditions, encoding = _timed(bench.encode, prompt)
    latents, loop = _timed(bench.fine if name is None else bench.denoisers[name], conditions, noise)
    picture, decoding = _timed(bench.decode, latents)
    return _Run(latents, picture, loop, encoding + loop + decoding)


def _timed(run: Callable[..., Array | Conditions], *given: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    result = run(*given)
    return result, time.perf_counter() - start


def _compare(bench: Bench, prompt: str, run: _Run, uncached: _Run, fine: Array) -> Measured:
    return Measured(
        psnr_db=psnr_db(run.picture, uncached.picture),
        psnr_db_fine=psnr_db(run.picture, fine),
        ssim=ssim(run.picture, uncached.picture),
        latent_error=latent_rel_l2(run.latents, uncached.latents),
        loop_seconds=run.loop_seconds,
        total_seconds=run.total_seconds,
        lpips=bench.lpips.distance(run.picture, uncached.picture),
        attributes={} if bench.reader is None else bench.reader.score(run.picture, prompt),
    )
