"""``cachec calibrate``: statistics of uncached runs, into a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.calibration.statistics import check_reference, record_statistics, save_statistics
from cachec.compiler.calibration.uses import MIN_PROMPTS, NUM_CALIBRATION, Use, calibration_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.options import make_settings, read_options
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import InputError, need
from cachec.runtime.files import check_file
from cachec.runtime.noise import check_seed
from cachec.runtime.work import remove_work

USES: Mapping[Use, str] = {"fit": "fit on", "stop": "choose by", "measure": "measure on"}


def calibrate_to_file(
    source: str, out: Path, *, num: int = NUM_CALIBRATION, force: bool = False, **options: Any
) -> list[tuple[str, str]]:
    """Calibrate the model ``source`` into ``out``; finished batches lie beside it until it is done.

    ``options`` are those that ``cachec.compiler.options`` declares for it. Returns the rows of a short table.

    Raises:
        InputError: there are too few prompts, or an option cannot be used.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    need("torch", "diffusers", "transformers", extra="compile", purpose="calibrating on a model's graphs")
    from cachec.compiler.frontend import evaluator_of
    from cachec.compiler.request import evaluated_in

    wish, spec = read_options(options, "calibrate"), find_model(source)
    seed, reference_steps, own = wish.fit.seed, wish.fit.reference_steps or 0, wish.fit.prompts is not None
    check_seed(seed)
    settings, device = make_settings(spec, wish.model), DeviceName.parse(wish.build.device or CPU)
    if evaluated_in(settings, device) != settings.dtype:
        raise InputError(
            f"dtype is {settings.dtype}, but on the CPU models are run in float32: use --device cuda, or leave it out"
        )
    listed = default_prompts(spec.prompts, "train") if wish.fit.prompts is None else read_prompts(wish.fit.prompts)
    if num < MIN_PROMPTS:
        raise InputError(f"num is {num}; calibration needs at least {MIN_PROMPTS} prompts, to fit on and to choose by")
    if num > len(listed):
        raise InputError(f"num is {num}, but there are only {len(listed)} prompts: give more with --prompts")
    chosen = calibration_prompts(spec.prompts, listed[:num] if own else None, num)
    check_reference(settings.steps, reference_steps)
    check_file(out, force=force)
    model = load_model(spec)
    work = out.with_name(out.name + ".parts")
    statistics = record_statistics(
        model,
        evaluator_of(model, settings, device),
        settings,
        chosen,
        reference_steps=reference_steps,
        seed=seed,
        work=work,
    )
    save_statistics(statistics, out)
    remove_work(work)
    return [
        ("calibration", str(out)),
        ("prompts", ", ".join(f"{len(chosen.places(use))} to {text}" for use, text in USES.items())),
        ("steps", f"{settings.steps}" + (f", fine reference {reference_steps}" if reference_steps else "")),
        ("size", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]
