"""``cachec calibrate``: statistics of uncached runs, into a file."""

from pathlib import Path
from typing import Any

from cachec.compiler.calibration.statistics import check_reference, record_statistics, save_statistics
from cachec.compiler.calibration.uses import choose_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.options import make_settings, read_options
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import InputError, need
from cachec.runtime.files import check_file
from cachec.runtime.noise import check_seed
from cachec.runtime.work import remove_work


def calibrate_to_file(
    source: str, out: Path, *, num: int | None = None, force: bool = False, **options: Any
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
    seed, reference_steps = wish.fit.seed, wish.fit.reference_steps or 0
    check_seed(seed)
    settings, device = make_settings(spec, wish.model), DeviceName.parse(wish.build.device or CPU)
    if evaluated_in(settings, device) != settings.dtype:
        raise InputError(
            f"dtype is {settings.dtype}, but on the CPU models are run in float32: use --device cuda, or leave it out"
        )
    chosen = choose_prompts(spec.prompts, wish.fit.prompts, num)
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
        ("prompts", chosen.in_words),
        ("steps", f"{settings.steps}" + (f", fine reference {reference_steps}" if reference_steps else "")),
        ("size", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]
