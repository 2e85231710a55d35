"""Distillation as a whole: record the teacher, train the student, say all that is worth knowing of it."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.runs import RunStep, Subject, WantedRun, record_runs, recording_here, training_seeds
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.distillation.meanflow import Distilling
from cachec.compiler.distillation.student import told_per_level
from cachec.compiler.distillation.training import DistillationData, DistillationState, Distiller
from cachec.compiler.models.base import UNGUIDED, LoadedModel, Settings
from cachec.compiler.models.flow_maps import flow_map_kind
from cachec.engines.torch_device import watching_memory
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array
from cachec.runtime.version import VERSION
from cachec.runtime.work import claim_work


@dataclass(frozen=True)
class Distilled:
    """The student's transformer, and what its file is to say."""

    transformer: nn.Module
    facts: Mapping[str, Any]


def check_teacher(model: LoadedModel, settings: Settings, prompts: UsedPrompts) -> None:
    """Raise ``InputError`` unless the model can be distilled at these settings, before anything slow."""
    if model.expert is not None:
        raise InputError(f"{model.spec.name} has two transformers, and one is distilled: take another model")
    flow_map_kind(model.transformer if model.stored is None else model.stored.module)
    model.example_inputs(settings)  # which knows the model's sizes
    told_per_level(model.spec.name, model.sampling(settings))
    for use in ("fit", "stop"):
        if not prompts.places(use):
            raise InputError(f"{len(prompts.prompts)} prompts are too few to train on some and to stop by others: give more")


def distil(
    model: LoadedModel,
    evaluator: Evaluator,
    settings: Settings,
    prompts: UsedPrompts,
    asked: Distilling,
    *,
    seed: int,
    work: Path,
) -> Distilled:
    """Distil ``model`` on ``evaluator``'s device; ``settings`` are the teacher's. A rerun goes on from what lies in ``work``.

    Raises:
        InputError: the model cannot be distilled, or ``work`` holds something else.
        OutputError: another process works there, or it cannot be written.
    """
    check_teacher(model, settings, prompts)
    subject = Subject.of(model, settings)
    facts = _known(model, settings, prompts, asked, seed)
    with claim_work(work, "distillation", {name: str(value) for name, value in facts.items()}):
        wanted, seeds = WantedRun(subject.own_sampling, keep_final), training_seeds(seed, len(prompts.prompts))
        title = f"uncached runs of {len(prompts.prompts)} prompts"
        runs = record_runs(recording_here(subject, evaluator), prompts.prompts, [wanted], seeds=seeds, work=work, title=title)
        held_out = prompts.places("stop")
        order, conditions = np.array([*prompts.places("fit"), *held_out]), subject.encode(prompts.prompts)
        data = DistillationData(
            model=model,
            settings=settings,
            evaluator=evaluator,
            sampling=subject.own_sampling,
            few=model.sampling(settings.with_steps(asked.steps)),
            noise=runs["noise"][order],
            final=runs["final"][order],
            conditions={name: value[order] for name, value in conditions.items()},
            held_out=len(held_out),
            seed=seed,
            work=work,
        )
        with watching_memory(f"distilling on {evaluator.device}", "Take a smaller --batch, or a device with more memory"):
            distiller = Distiller(data, asked)
            transformer = distiller.run()
    return Distilled(transformer, {**facts, **_found(distiller.state)})


def keep_final(steps: Iterator[RunStep]) -> dict[str, Array]:
    """The latents that a run ends with."""
    *_, last = steps
    return {"final": last.latents}


def _known(model: LoadedModel, settings: Settings, prompts: UsedPrompts, asked: Distilling, seed: int) -> dict[str, Any]:
    """What is known before: the student's own settings, and what it is made from."""
    rule, folded = model.io.guidance, model.is_guided(settings) and model.branch_setting == "guidance"
    return {
        **vars(asked),
        "guidance": UNGUIDED[rule] if folded and rule is not None else settings.guidance,
        "height": settings.height,
        "width": settings.width,
        "frames": settings.frames,
        "text_tokens": settings.text_tokens,
        "prompts": model.spec.prompts,
        "teacher": model.spec.portable_source,
        "teacher_sha256": model.weights_hash,
        "teacher_steps": settings.steps,
        "teacher_guidance": settings.guidance,
        "teacher_true_cfg_scale": settings.true_cfg_scale,
        "seed": seed,
        "num_prompts": len(prompts.prompts),
        "prompts_sha256": prompts.facts["prompts_sha256"],
    }


def _found(state: DistillationState) -> dict[str, Any]:
    return {
        "held_out_rel_l2": state.best,
        "best_update": state.best_update,
        "diverged": state.diverged,
        "training_seconds": round(state.seconds),
        "curve": state.curve,
        "made_by": f"cachec {VERSION}",
        "torch": importlib.metadata.version("torch"),
    }
