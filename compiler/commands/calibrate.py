"""``cachec calibrate``: statistics of uncached runs, into a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.conditions import load_conditions, subject_of_bundle
from cachec.compiler.calibration.crew import choose_crew, first_device
from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.runs import Recorders, Subject, encode_ahead, recording_here
from cachec.compiler.calibration.statistics import check_reference, record_statistics, save_statistics
from cachec.compiler.calibration.uses import UsedPrompts, choose_prompts
from cachec.compiler.calibration.workers import at_work
from cachec.compiler.commands.recipes import BundleRecorder, ModelRecorder, check_torch_device
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.lora_files import parse_loras
from cachec.compiler.options import ModelSettings, Options, check_single, make_settings, read_options
from cachec.engines import open_bundle
from cachec.engines.gpu import check_gpu
from cachec.runtime.bundle import MANIFEST, Bundle
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import InputError, need
from cachec.runtime.files import check_file
from cachec.runtime.noise import check_seed
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import LoadedBundle
from cachec.runtime.work import remove_work


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What is run, by whom, and on which prompts."""

    subject: Subject
    recorders: Recorders
    prompts: UsedPrompts


def calibrate_to_file(
    source: str,
    out: Path,
    *,
    num: int | None = None,
    conditions: Path | None = None,
    force: bool = False,
    **options: Any,
) -> list[tuple[str, str]]:
    """Calibrate ``source``, a model or a bundle, into ``out``; finished batches lie beside it until it is done.

    A bundle runs on its own engines, without torch, on ``conditions`` that ``cachec encode`` made. ``options`` are those that
    ``cachec.compiler.options`` declares for it. Returns the rows of a short table.

    Raises:
        InputError: there are too few prompts, or an option cannot be used.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    wish = read_options(options, "calibrate")
    seed, reference_steps = wish.fit.seed, wish.fit.reference_steps or 0
    check_seed(seed)
    check_file(out, force=force)
    work = out.with_name(out.name + ".parts")
    if (Path(source) / MANIFEST).is_file():
        _check_bundled(wish, num, [name for name in options if name in SETTLED])
        opened = _of_bundle(Path(source), wish, conditions)
    elif conditions is not None:
        raise InputError(f"{source} is a model, which encodes its prompts itself: leave --conditions out, or give a bundle")
    else:
        opened = _of_model(source, wish, num, work)
    with opened as what:
        statistics = record_statistics(
            what.subject, what.recorders, what.prompts, reference_steps=reference_steps, seed=seed, work=work
        )
    save_statistics(statistics, out)
    remove_work(work)
    return [
        ("calibration", str(out)),
        ("prompts", what.prompts.in_words),
        ("steps", f"{what.subject.settings.steps}" + (f", fine reference {reference_steps}" if reference_steps else "")),
        ("size", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]


@contextmanager
def _of_model(source: str, wish: Options, num: int | None, work: Path) -> Iterator[Calibrated]:
    """A model on its graphs."""
    need("torch", "diffusers", "transformers", extra="compile", purpose="calibrating on a model's graphs")
    crew = choose_crew(wish.workers, wish.build.device, check_torch_device, default=CPU)
    from cachec.compiler.frontend import evaluator_of
    from cachec.compiler.planning.room import check_calibration
    from cachec.compiler.request import evaluated_in

    spec = find_model(source)
    settings, device = make_settings(spec, wish.model), DeviceName.parse(first_device(wish.workers, wish.build.device) or CPU)
    if evaluated_in(settings, device) != settings.dtype:
        raise InputError(
            f"dtype is {settings.dtype}, but on the CPU models are run in float32: use --device cuda, or leave it out"
        )
    prompts = choose_prompts(spec.prompts, wish.fit.prompts, num)
    check_reference(settings.steps, wish.fit.reference_steps or 0)
    loras = parse_loras(wish.model.lora)
    model = load_model(spec, loras=loras)
    check_calibration(model, settings, prompts, wish.fit.reference_steps or 0, work)
    if crew is None:
        with model.hashing_weights():
            encode_ahead(model, prompts.prompts, settings)
            evaluator = evaluator_of(model, settings, device)
            subject = Subject.of(model, settings)
        yield Calibrated(subject, recording_here(subject, evaluator), prompts)
        return
    with model.hashing_weights(), at_work(crew, ModelRecorder(spec.portable_source, settings, loras)) as recorders:
        yield Calibrated(Subject.of(model, settings), recorders, prompts)


SETTLED = tuple(one.name for one in fields(ModelSettings) if one.name not in ("size", "steps"))  # when a bundle was compiled


def _check_bundled(wish: Options, num: int | None, settled: list[str]) -> None:
    """Raise ``InputError`` for options that a bundle does not leave open; ``settled`` are those of them that were given."""
    if wish.fit.prompts is not None or num is not None:
        given = "num" if wish.fit.prompts is None else "prompts"
        raise InputError(
            f"--{given} cannot be used with a bundle, which has no text encoders: encode them first, with cachec encode MODEL "
            f"--{given} …, and give the result as --conditions"
        )
    if settled:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in settled)
        raise InputError(
            f"{names} cannot be used with a bundle: its settings are those that it was compiled with. Leave it out"
        )
    if wish.fit.reference_steps:
        raise InputError(
            f"reference-steps is {wish.fit.reference_steps}, but a bundle has the noise levels of its own steps only: "
            "calibrate the model itself for a fine reference"
        )


@contextmanager
def _of_bundle(root: Path, wish: Options, conditions: Path | None) -> Iterator[Calibrated]:
    """A bundle on its own engines."""
    if conditions is None:
        raise InputError("a bundle has no text encoders: give --conditions, which cachec encode makes of prompts")
    crew, encoded = choose_crew(wish.workers, wish.build.device, check_gpu), load_conditions(conditions)
    check_single(wish.model)
    size = None if wish.model.size is None else str(wish.model.size[0])
    steps = None if wish.model.steps is None else wish.model.steps[0]
    if crew is None:
        with open_bundle(root, device=wish.build.device, size=size, steps=steps) as bundle:
            subject = subject_of_bundle(bundle, encoded)
            yield Calibrated(subject, recording_here(subject, EngineEvaluator.of(bundle)), encoded.prompts)
        return
    closed = Bundle.open(root).at(size, steps)  # and no engine of it, which may not fit this machine
    unloaded = LoadedBundle(closed.manifest, {UNCACHED: closed.program(UNCACHED)}, {}, closed.target)
    subject = subject_of_bundle(unloaded, encoded)
    with at_work(crew, BundleRecorder(root.resolve(), conditions.resolve(), size, steps)) as recorders:
        yield Calibrated(subject, recorders, encoded.prompts)
