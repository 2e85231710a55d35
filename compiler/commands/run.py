"""``cachec run``: text in, pictures out. The denoise loop is the light runtime's; text encoders and VAE are the model's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cachec.compiler.calibration.metrics import psnr_db
from cachec.compiler.evaluation.pictures import Cell, draw_sheet, write_picture, write_png
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings, check_prompts, settings_of
from cachec.engines import open_bundle
from cachec.runtime.errors import InputError
from cachec.runtime.files import check_file, write_file
from cachec.runtime.noise import check_seed, make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array
from cachec.runtime.trace import Trace


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
    seed: int = 0,
    compare: bool = False,
    device: str | None = None,
    target: str | None = None,
    size: str | None = None,
    steps: int | None = None,
    weights: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    force: bool = False,
    profile: Path | None = None,
) -> list[tuple[str, str]]:
    """Make a picture per prompt, or with ``compare`` one sheet of all. Returns the rows of a short table.

    ``size`` and ``steps``: one of each that the bundle was compiled for; by default its first. ``negative``: the prompt of
    guidance's negative branch, ``guidance`` and ``true_cfg_scale`` scales; by default no text, and the bundle's scales.
    ``weights``: some that were added to the bundle, in place of its own.

    ``profile``: where to write a trace of the last request's engine calls, after one request to warm up.

    Raises:
        InputError: a prompt is empty, the seed is negative, the file is no PNG, or there is no such device, or no such
            size or number of steps in the bundle.
        OutputError: a file exists already, or cannot be written.
    """
    check_prompts(prompts)
    check_seed(seed)
    if out.suffix.lower() not in ("", ".png"):
        raise InputError(f"-o is {out.name}, but pictures are written as PNG: name it {out.stem}.png")
    if profile is not None and compare:
        raise InputError("--profile is of one run, --compare makes two: leave one out")
    files = [out] if compare or len(prompts) == 1 else _numbered(out, len(prompts))
    for file in [*files, *([] if profile is None else [profile])]:
        check_file(file, force=force)
    where: dict[str, Any] = {"device": device, "target": target, "size": size, "steps": steps, "weights": weights}
    with open_bundle(bundle, **where, verify=verify, threads=threads) as loaded:
        model = load_model(find_model(source or loaded.manifest.model["source"]), with_transformer=False)
        level = loaded.check_level(level)
        make = _Maker(model, _guided(loaded, guidance, true_cfg_scale, negative), negative)
        if compare:
            return _compare(loaded, level, make, prompts, seed, out)
        session = loaded.session(batch=loaded.programs[level].key.batch or 1, level=level)
        rows = [_target_row(loaded)]
        for index, (prompt, file) in enumerate(zip(prompts, files, strict=True)):
            picture, seconds, total = make.picture(session, prompt, seed + index)
            write_picture(picture, file)
            rows.append((str(file), f"denoise loop {seconds:.3f} s, request {total:.3f} s: {prompt}"))
        if profile is not None:
            rows += _profile(session, make, prompts[-1], seed + len(prompts) - 1, profile)
        return rows


def _target_row(loaded: LoadedBundle) -> tuple[str, str]:
    return "target", f"{loaded.target}; runs on {loaded.engines['compute'].device.name}"


def _numbered(out: Path, num: int) -> list[Path]:
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix or '.png'}") for i in range(num)]


def _guided(loaded: LoadedBundle, guidance: float | None, true_cfg_scale: float | None, negative: str | None) -> Settings:
    """The bundle's settings, at other scales of guidance if these are asked for.

    Raises:
        InputError: its model takes no scale, or its Programs no negative branch.
    """
    settings, io = settings_of(loaded.manifest), loaded.io
    two_branches = any(program.key.guided for program in loaded.programs.values())
    if negative is not None and not two_branches:
        raise InputError(
            "--negative-prompt: the bundle's requests have no negative branch"
            + (
                "; compile it at a scale that has one (--guidance, or --true-cfg-scale beside an embedded one)"
                if io.guidance
                else ", as its model has none: leave it out"
            )
        )
    if true_cfg_scale is not None:
        if not two_branches:
            raise InputError(
                f"--true-cfg-scale {true_cfg_scale:g}: the bundle's requests have no negative branch; compile it with one"
            )
        settings = replace(settings, true_cfg_scale=true_cfg_scale)
    if guidance is None:
        return settings
    if not two_branches and "guidance" not in io.conditions:
        raise InputError(
            f"--guidance {guidance:g}: the bundle's requests have no guidance scale: leave it out, or compile at one"
        )
    return replace(settings, guidance=guidance)


@dataclass(frozen=True)
class _Maker:
    """Pictures of prompts: ``settings`` have the guidance scale, ``negative`` is the negative branch's prompt."""

    model: LoadedModel
    settings: Settings
    negative: str | None

    def picture(self, session: Session, prompt: str, seed: int) -> tuple[Array, float, float]:
        """A picture [H, W, 3] or video [F, H, W, 3], the seconds of its denoise loop, and those of the whole request."""
        start = time.perf_counter()
        batch = session.latent_shape[0]  # more than one only if the bundle takes no other; the copies are then dropped
        negatives = [] if self.negative is None else [[self.negative] * batch]
        conditions = self.model.encode([prompt] * batch, self.settings, session.conditions, *negatives)
        noise = np.repeat(make_noise(seed, session.latent_shape[1:])[None], batch, axis=0)
        before = time.perf_counter()
        latents = session.run(conditions, noise)
        after = time.perf_counter()
        picture = self.model.decode(latents[:1], self.settings)[0]
        return picture, after - before, time.perf_counter() - start


def _profile(session: Session, make: _Maker, prompt: str, seed: int, out: Path) -> list[tuple[str, str]]:
    """One more request, traced."""
    session.trace = Trace()
    _, seconds, _ = make.picture(session, prompt, seed)
    trace, session.trace = session.trace, None
    write_file(out, trace.to_json().encode())
    spent = trace.seconds()
    calls = {name: sum(event["name"] == name for event in trace.events) for name in spent}
    rows = [(f"  {name}", f"{calls[name]} calls, {1e3 * time:.2f} ms") for name, time in spent.items()]
    rest = ("  outside engines", f"{1e3 * (seconds - sum(spent.values())):.2f} ms")
    return [(str(out), "open it in ui.perfetto.dev or chrome://tracing"), *rows, rest]


def _compare(
    loaded: LoadedBundle, level: str, make: _Maker, prompts: Sequence[str], seed: int, out: Path
) -> list[tuple[str, str]]:
    program = loaded.programs[level]
    batch = program.key.batch or 1
    sessions = [Session(loaded.engines, one, loaded.io, batch=batch) for one in (loaded.programs[UNCACHED], program)]
    for session in sessions:  # the first call of an engine is slow, and would be charged to the uncached run
        make.picture(session, prompts[0], seed)
    name, computed = loaded.manifest.method["name"], len(program.compute_steps)
    rows, psnrs, seconds = [], [], []
    for index, prompt in enumerate(prompts):
        (full, slow, _), (picture, fast, _) = (make.picture(one, prompt, seed + index) for one in sessions)
        psnrs.append(psnr_db(picture, full))
        seconds.append((slow, fast))
        cells = [
            Cell(full, ("uncached", f"{make.settings.steps} steps, {slow:.3f} s")),
            Cell(picture, (name, f"{computed} of {make.settings.steps}, {fast:.3f} s", f"PSNR {psnrs[-1]:.1f} dB")),
        ]
        rows.append((prompt, cells))
    write_png(draw_sheet(rows), out)
    slow, fast = np.median(np.array(seconds), axis=0)
    return [
        (str(out), f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, uncached beside {name}"),
        _target_row(loaded),
        ("denoise loop", f"{slow:.3f} s uncached, {fast:.3f} s {name}: {slow / fast:.2f} times as fast (medians)"),
        ("PSNR", f"{np.mean(psnrs):.2f} dB against the uncached pictures, mean"),
    ]
