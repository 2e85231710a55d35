"""``cachec distill``: a model of few steps, which is told where they end, into a directory."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.compiler.commands.recipes import check_torch_device
from cachec.compiler.models import find_directory, find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.options import check_single, make_settings, read_options
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import need
from cachec.runtime.noise import check_seed
from cachec.runtime.work import remove_work

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def distill_to_directory(source: str, out: Path, *, force: bool, **options: Any) -> list[tuple[str, str]]:
    """Distil the model ``source`` into the directory ``out``, with work files beside it until it is done.

    ``options`` are those that ``cachec.compiler.options`` declares for it. Returns the rows of a short table.

    Raises:
        InputError: an option cannot be used, there are too few prompts, or the model cannot be distilled.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    need("torch", "diffusers", "transformers", extra="compile", purpose="distillation")
    from cachec.compiler.calibration.prompts import read_prompts
    from cachec.compiler.calibration.runs import encode_ahead
    from cachec.compiler.calibration.uses import training_prompts
    from cachec.compiler.distillation.distil import check_teacher, distil
    from cachec.compiler.distillation.meanflow import Distilling
    from cachec.compiler.frontend import evaluator_of
    from cachec.compiler.models.distilled import check_place, write_distilled
    from cachec.compiler.models.flow_maps import named_in_index
    from cachec.engines.onnx_files import only_errors

    wish = read_options(options, "distill")
    given = vars(wish.distill)
    asked = Distilling(**{name.removeprefix("distilled_"): value for name, value in given.items() if name != "teacher_steps"})
    check_seed(wish.fit.seed)
    check_single(wish.model)
    device = DeviceName.parse(wish.build.device or CPU)
    check_torch_device(device)
    check_place(out, force=force)
    spec = find_model(source)
    teacher_steps = wish.distill.teacher_steps
    settings = make_settings(spec, replace(wish.model, steps=None if teacher_steps is None else (teacher_steps,)))
    prompts = training_prompts(spec.prompts, None if wish.fit.prompts is None else read_prompts(wish.fit.prompts))
    model, work = load_model(spec), out.with_name(out.name + ".distilling")
    check_teacher(model, settings, prompts)
    _warn_of_long_steps(model, settings, asked.steps, asked.restrict)
    encode_ahead(model, prompts.prompts, settings)
    with model.hashing_weights():
        evaluator = evaluator_of(model, settings, device)
        made = distil(model, evaluator, settings, prompts, asked, seed=wish.fit.seed, work=work)
    with only_errors("diffusers.models.modeling_utils"):  # which warns of modules to be kept in float32, and names none
        student = made.transformer.cpu().to(_stored_in(model))
    write_distilled(find_directory(spec), out, student, named_in_index(student), made.facts, force=force)
    remove_work(work)
    facts = [
        (name, str(made.facts[name])) for name in ("steps", "guidance", "best_update", "held_out_rel_l2", "training_seconds")
    ]
    ended = [("diverged", made.facts["diverged"])] if made.facts["diverged"] else []
    return [("model", str(out)), *facts, *ended]


def _stored_in(model: LoadedModel) -> "torch.dtype | None":
    """The type of the teacher's weights on disk."""
    assert model.stored is not None, "it was loaded from files"
    return model.stored.shards.dtype(next(name for name, _ in model.stored.module.named_parameters()))


def _warn_of_long_steps(model: LoadedModel, settings: Settings, steps: int, restrict: float) -> None:
    longest = float(np.abs(np.diff(model.sampling(settings.with_steps(steps)).sigmas)).max())
    if longest > restrict + 1e-6:
        log.warning(
            "the longest of %d steps is %.2f of the noise, and the student learns intervals up to %g: more --steps or a larger "
            "--restrict fit better", steps, longest, restrict,
        )  # fmt: skip
