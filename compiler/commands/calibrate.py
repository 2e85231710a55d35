"""``cachec calibrate``: statistics of uncached runs, into a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.calibration.statistics import check_reference, record_statistics, save_statistics
from cachec.compiler.calibration.uses import MIN_PROMPTS, NUM_CALIBRATION, Use, calibration_prompts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.options import ModelSettings, make_settings
from cachec.runtime.errors import InputError, need
from cachec.runtime.files import check_file
from cachec.runtime.noise import check_seed
from cachec.runtime.work import remove_work

USES: Mapping[Use, str] = {"fit": "fit on", "stop": "choose by", "measure": "measure on"}


def make_evaluator(model: LoadedModel, settings: Settings) -> Evaluator:
    """The float32 model's graphs, on PyTorch."""
    need("torch", "diffusers", "transformers", extra="compile", purpose="calibrating on a model's graphs")
    from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
    from cachec.compiler.graphs.prepare import prepare

    return GraphEvaluator(prepare(model, settings), model.io)


def calibrate_to_file(
    source: str,
    out: Path,
    *,
    prompts: str | Path | None = None,
    num: int = NUM_CALIBRATION,
    reference_steps: int | None = None,
    seed: int = 0,
    force: bool = False,
    **sizes: Any,
) -> list[tuple[str, str]]:
    """Calibrate the model ``source`` into ``out``; finished batches lie beside it until it is done.

    ``sizes`` are those of ``ModelSettings``. Returns the rows of a short table.

    Raises:
        InputError: there are too few prompts, or an option is out of range.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    check_seed(seed)
    spec = find_model(source)
    settings = make_settings(spec, ModelSettings(**sizes))
    listed = read_prompts(Path(prompts)) if prompts else default_prompts(spec.prompts, "train")
    if num < MIN_PROMPTS:
        raise InputError(f"num is {num}; calibration needs at least {MIN_PROMPTS} prompts, to fit on and to choose by")
    if num > len(listed):
        raise InputError(f"num is {num}, but there are only {len(listed)} prompts: give more with --prompts")
    chosen = calibration_prompts(spec.prompts, listed[:num] if prompts else None, num)
    check_reference(settings.steps, reference_steps or 0)
    check_file(out, force=force)
    model = load_model(spec)
    work = out.with_name(out.name + ".parts")
    statistics = record_statistics(
        model, make_evaluator(model, settings), settings, chosen, reference_steps=reference_steps or 0, seed=seed, work=work
    )
    save_statistics(statistics, out)
    remove_work(work)
    return [
        ("calibration", str(out)),
        ("prompts", ", ".join(f"{len(chosen.places(use))} to {text}" for use, text in USES.items())),
        ("steps", f"{settings.steps}" + (f", fine reference {reference_steps}" if reference_steps else "")),
        ("size", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]
