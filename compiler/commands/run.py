"""``cachec run``: text in, pictures out. Text encoders and decoder are the bundle's, or those of the model's pipeline."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cachec.compiler.calibration.metrics import psnr_db
from cachec.compiler.evaluation.pictures import Cell, draw_sheet, write_picture, write_png
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import check_prompts, settings_of
from cachec.compiler.options import read_levels
from cachec.engines import open_bundle
from cachec.pictures.beginning import Beginning
from cachec.pictures.files import read_picture, to_mp4
from cachec.pictures.generator import Generator
from cachec.pictures.scales import Scales
from cachec.runtime.errors import InputError
from cachec.runtime.files import check_file, reason_of, write_file
from cachec.runtime.noise import check_seed, make_noise
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array
from cachec.runtime.trace import Trace

log = logging.getLogger(__name__)


def generate_pictures(
    bundle: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    source: str | None = None,
    level: str | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    true_cfg_scale: float | None = None,
    picture: Path | None = None,
    strength: float | None = None,
    seed: int = 0,
    compare: bool = False,
    beside: Sequence[Path] = (),
    device: str | None = None,
    target: str | None = None,
    size: str | None = None,
    steps: int | None = None,
    sigmas: str | None = None,
    weights: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    force: bool = False,
    profile: Path | None = None,
) -> list[tuple[str, str]]:
    """Make a picture per prompt, or with ``compare`` one sheet of all. Returns the rows of a short table.

    ``size`` and ``steps``: one of each that the bundle was compiled for; by default its first. ``sigmas``: noise levels as the
    pipeline's call takes them, in text with commas, in the place of ``steps``. ``negative``: the prompt of
    guidance's negative branch, ``guidance`` and ``true_cfg_scale`` scales; by default no text, and the bundle's scales.
    ``weights``: some that were added to the bundle, in place of its own. ``picture``: a file to begin with, of the size that is
    asked for, or of any that the bundle has; the last ``strength`` of the steps are made.

    ``beside``: with ``compare``, bundles of the same size whose pictures of the same noise are shown, too; of another model
    than this one's, such as a distilled one, the uncached ones besides.

    ``profile``: where to write a trace of the last request's engine calls, after one request to warm up.

    Raises:
        InputError: a prompt is empty, the seed is negative, the file is no PNG nor, of a video, MP4, or there is no such
            device, size or number of steps in the bundle.
        OutputError: a file exists already, or cannot be written.
    """
    check_prompts(prompts)
    check_seed(seed)
    if out.suffix.lower() not in ("", ".png", ".mp4"):
        raise InputError(f"-o is {out.name}, but pictures are written as PNG: name it {out.stem}.png")
    if out.suffix.lower() == ".mp4" and compare:
        raise InputError(f"-o is {out.name}, but a sheet is a picture: name it {out.stem}.png")
    if profile is not None and compare:
        raise InputError("--profile is of one run, --compare makes two: leave one out")
    if beside and (not compare or picture is not None or sigmas is not None):
        raise InputError("--beside is of --compare alone, without --picture and --sigmas")
    files = [out] if compare or len(prompts) == 1 else _numbered(out, len(prompts))
    for file in [*files, *([] if profile is None else [profile])]:
        check_file(file, force=force)
    levels = None if sigmas is None else _read_sigmas(sigmas)
    if levels is not None and steps is not None:
        raise InputError(f"--steps {steps} and --sigmas contradict each other: give one")
    where: dict[str, Any] = {"device": device, "target": target, "size": size, "steps": steps, "weights": weights}
    with open_bundle(bundle, **where, verify=verify, threads=threads) as opened:
        given = None if picture is None else _read(picture, opened, size)
        there = opened if given is None else opened.at(f"{given.shape[1]}x{given.shape[0]}")
        loaded = there if levels is None else there.with_sigmas(levels)
        level = loaded.check_level(level)
        if out.suffix.lower() == ".mp4" and loaded.manifest.settings["frames"] == 1:
            raise InputError(f"-o is {out.name}, but the bundle makes pictures: name it {out.stem}.png")
        make = _maker(loaded, source, guidance, true_cfg_scale, negative)
        begin = make.begin(loaded, given, strength)
        if compare:
            with ExitStack() as stack:
                columns = _columns(loaded, level, make, begin)
                for path in beside:
                    other = stack.enter_context(open_bundle(path, device=device, size=size, verify=verify, threads=threads))
                    of_it = _columns(other, other.check_level(None), _maker(other, None, guidance, true_cfg_scale, negative))
                    columns += of_it[1:] if columns[0].is_of(other) else of_it
                return _compare(columns, prompts, seed, out)
        sessions = _Sessions(loaded, level, begin)
        rows = [_target_row(loaded), _parts_row(make)]
        for index, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
            made, seconds, total = make.picture(sessions, prompt, seed + index)
            _write(made, file)
            rows.append((str(file), f"denoise loop {seconds:.3f} s, request {total:.3f} s: {prompt}"))
        if profile is not None:
            rows += _profile(sessions, make, prompts[-1], seed + len(prompts) - 1, profile)
        return rows


def _read_sigmas(text: str) -> list[float]:
    try:
        (levels,) = read_levels(text)
        return list(levels)
    except ValueError as error:
        raise InputError(f"sigmas is {text!r}; it must be numbers with commas, such as 1,0.75,0.5") from error


def _read(file: Path, loaded: LoadedBundle, size: str | None) -> Array:
    """A picture of the size that is asked for, or of any that the bundle has."""
    (own,) = loaded.manifest.variants
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"--picture {file} cannot be read: {reason_of(error)}") from error
    return read_picture(content, [own.size] if size or loaded.bundle is None else loaded.bundle.manifest.sizes)


def _write(picture: Array, file: Path) -> None:
    if file.suffix.lower() == ".mp4":
        write_file(file, to_mp4((picture * 255).round().astype(np.uint8)))
    else:
        write_picture(picture, file)


def _target_row(loaded: LoadedBundle) -> tuple[str, str]:
    return "target", f"{loaded.target}; runs on {loaded.engines['compute'].device.name}"


def _parts_row(make: "_Maker") -> tuple[str, str]:
    return "text, pictures", make.told


def _numbered(out: Path, num: int) -> list[Path]:
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix or '.png'}") for i in range(num)]


@dataclass(frozen=True)
class _Sessions:
    """Sessions of a level, one for each length of texts that was met; where they ``begin``."""

    loaded: LoadedBundle
    level: str
    begin: Beginning
    known: dict[int | None, Session] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """What is played."""
        return self.loaded.begun(self.loaded.programs[self.level], self.begin.start)

    @property
    def batch(self) -> int:
        """More than one only if the bundle takes no other."""
        return self.loaded.programs[self.level].key.batch or 1

    def fitting(self, conditions: Mapping[str, Array]) -> tuple[Session, Mapping[str, Array]]:
        """The session for these, and them as it takes them."""
        there, fitted = self.loaded.fitted(conditions)
        text = there.manifest.settings.get("text_tokens")
        if text not in self.known:
            self.known[text] = there.session(batch=self.batch, level=self.level, start=self.begin.start)
        return self.known[text], fitted


class _Maker(ABC):
    """Pictures of prompts: what reads prompts and decodes latents, at a request's scales of guidance."""

    told: str  # what it is, in words

    @abstractmethod
    def encode(self, prompts: Sequence[str], names: Sequence[str]) -> dict[str, Array]:
        """The conditions ``names`` of a request, those of the negative branch among them."""

    @abstractmethod
    def decode(self, latents: Array) -> Array:
        """Pictures in [0, 1]."""

    def begin(self, loaded: LoadedBundle, picture: Array | None, strength: float | None) -> Beginning:
        """Where a request begins that has a picture [H, W, 3], or none. Raises ``InputError`` if there is no encoder of it."""
        if picture is not None or strength is not None:
            raise InputError("--picture and --strength are for bundles with an encoder of pictures: compile it with "
                             "--components all, and leave --model out")  # fmt: skip
        return Beginning()

    def picture(self, sessions: _Sessions, prompt: str, seed: int, trace: Trace | None = None) -> tuple[Array, float, float]:
        """A picture [H, W, 3] or video [F, H, W, 3], the seconds of its denoise loop, and those of the whole request."""
        start = time.perf_counter()
        batch = sessions.batch  # copies are dropped
        encoded = self.encode([prompt] * batch, sessions.loaded.conditions(sessions.level))
        session, conditions = sessions.fitting(encoded)
        session.trace = trace
        noise = np.repeat(make_noise(seed, session.latent_shape[1:])[None], batch, axis=0)
        before = time.perf_counter()
        latents = session.run(conditions, sessions.begin.mixed(noise, session.program.sigmas))
        after = time.perf_counter()
        picture = self.decode(latents[:1])[0]
        return picture, after - before, time.perf_counter() - start


class _OfBundle(_Maker):
    """By the bundle's own text encoders and decoder, without torch."""

    told = "the bundle's own text encoders and decoder"

    def __init__(self, loaded: LoadedBundle, scales: Scales, negative: str | None) -> None:
        self._generator, self._scales, self._negative = Generator(loaded), scales, negative

    def encode(self, prompts: Sequence[str], names: Sequence[str]) -> dict[str, Array]:
        negatives = None if self._negative is None else [self._negative] * len(prompts)
        return self._generator.conditions(prompts, names, self._scales, negatives)

    def decode(self, latents: Array) -> Array:
        return self._generator.decoded(latents)

    def begin(self, loaded: LoadedBundle, picture: Array | None, strength: float | None) -> Beginning:
        return self._generator.begin(loaded, None if picture is None else picture[None], strength, 1)


class _OfPipeline(_Maker):
    """By the pipeline that the bundle was compiled from."""

    def __init__(self, loaded: LoadedBundle, source: str, scales: Scales, negative: str | None) -> None:
        self._model = load_model(find_model(source), with_transformer=False)
        settings = settings_of(loaded.manifest)
        self._settings = replace(settings, guidance=scales.guidance, true_cfg_scale=scales.true)
        self._negative = negative
        self.told = f"those of {source}, loaded by diffusers"

    def encode(self, prompts: Sequence[str], names: Sequence[str]) -> dict[str, Array]:
        negatives = [] if self._negative is None else [[self._negative] * len(prompts)]
        return self._model.encode(prompts, self._settings, names, *negatives)

    def decode(self, latents: Array) -> Array:
        return self._model.decode(latents, self._settings)


def _maker(
    loaded: LoadedBundle, source: str | None, guidance: float | None, true: float | None, negative: str | None
) -> _Maker:
    """The bundle's own parts, if it has them and no other model is asked for; else the pipeline's, and that is said."""
    scales = Scales.of(loaded, guidance=guidance, true=true, negative=negative is not None)
    if loaded.manifest.pictures and source is None:
        return _OfBundle(loaded, scales, negative)
    made = _OfPipeline(loaded, source or loaded.manifest.model["source"], scales, negative)
    log.info("text encoders and decoder are %s", made.told)
    return made


def _profile(sessions: _Sessions, make: _Maker, prompt: str, seed: int, out: Path) -> list[tuple[str, str]]:
    """One more request, traced."""
    trace = Trace()
    _, seconds, _ = make.picture(sessions, prompt, seed, trace)
    write_file(out, trace.to_json().encode())
    spent = trace.seconds()
    calls = {name: sum(event["name"] == name for event in trace.events) for name in spent}
    rows = [(f"  {name}", f"{calls[name]} calls, {1e3 * time:.2f} ms") for name, time in spent.items()]
    rest = ("  outside engines", f"{1e3 * (seconds - sum(spent.values())):.2f} ms")
    return [(str(out), "open it in ui.perfetto.dev or chrome://tracing"), *rows, rest]


@dataclass(frozen=True, eq=False)
class _Column:
    """What a sheet compares: a level, and what reads and decodes for it."""

    name: str
    sessions: _Sessions
    make: _Maker

    def is_of(self, loaded: LoadedBundle) -> bool:
        """Is this the same model?"""
        return bool(self.sessions.loaded.manifest.model["weights_sha256"] == loaded.manifest.model["weights_sha256"])

    @property
    def computed(self) -> str:
        program = self.sessions.program
        steps, computed = program.num_steps - program.key.start_step, len(program.compute_steps)
        return f"{steps} steps" if computed == steps else f"{computed} of {steps}"


def _columns(loaded: LoadedBundle, level: str, make: _Maker, begin: Beginning | None = None) -> list[_Column]:
    """The uncached run of a bundle, and a level of it."""
    both = ((UNCACHED, UNCACHED), (level, str(loaded.manifest.method["name"])))
    return [_Column(name, _Sessions(loaded, one, begin or Beginning()), make) for one, name in both]


def _compare(columns: Sequence[_Column], prompts: Sequence[str], seed: int, out: Path) -> list[tuple[str, str]]:
    """``columns``: the uncached run, a level of the same bundle, and those of others."""
    for prompt in prompts if any(len(one.sessions.loaded.texts) > 1 for one in columns) else prompts[:1]:
        for one in columns:  # an engine's first call is slow, at each length of texts
            one.make.picture(one.sessions, prompt, seed)
    rows, psnrs, seconds = [], [], []
    for index, prompt in enumerate(prompts):
        made = [one.make.picture(one.sessions, prompt, seed + index)[:2] for one in columns]
        full = made[0][0]
        if strange := [array.shape for array, _ in made if array.shape != full.shape]:
            raise InputError(
                f"--beside: pictures of {list(full.shape)} cannot be compared with {list(strange[0])}: give a --size"
            )
        psnrs.append([psnr_db(picture, full) for picture, _ in made])
        seconds.append([each for _, each in made])
        cells = [
            Cell(
                picture, (name, f"{one.computed}, {each:.3f} s", *([f"PSNR {decibels:.1f} dB"] if picture is not full else []))
            )
            for name, one, (picture, each), decibels in zip(_named(columns), columns, made, psnrs[-1], strict=True)
        ]
        rows.append((prompt, cells))
    write_png(draw_sheet(rows), out)
    (slow, fast, *others), (_, near, *more) = np.median(np.array(seconds), axis=0), np.mean(np.array(psnrs), axis=0)
    name = columns[1].name
    beside = [
        (title, f"{one.computed}, {each:.3f} s, {slow / each:.2f} times as fast, {decibels:.2f} dB")
        for title, one, each, decibels in zip(_named(columns)[2:], columns[2:], others, more, strict=True)
    ]
    return [
        (str(out), f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, uncached beside {name}"),
        _target_row(columns[1].sessions.loaded),
        _parts_row(columns[1].make),
        ("denoise loop", f"{slow:.3f} s uncached, {fast:.3f} s {name}: {slow / fast:.2f} times as fast (medians)"),
        ("PSNR", f"{near:.2f} dB against the uncached pictures, mean"),
        *beside,
    ]


def _named(columns: Sequence[_Column]) -> list[str]:
    """With the model's name, if it is not that of the first."""
    models = [one.sessions.loaded.manifest.model["name"] for one in columns]
    return [
        one.name if columns[0].is_of(one.sessions.loaded) else f"{model}, {one.name}"
        for model, one in zip(models, columns, strict=True)
    ]
