"""Training a predictor: record the uncached model, fit, and write down all facts."""

import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.runs import (
    RecorderFacts,
    Recorders,
    Subject,
    record_features,
    record_states,
    record_trajectories,
    recording_here,
)
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.methods.base import BlockData, BlockMethod, CodedMethod, Method, PredictorMethod, TrainingData
from cachec.compiler.methods.parameters import WEIGHTS, Parameters, find_pretrained, shipped_models
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.distribution import INSTALL, NAME, models_folder
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.torch_device import watching_memory
from cachec.runtime.abi import negative_name
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.program import hash_sigmas
from cachec.runtime.variants import PictureSize
from cachec.runtime.version import VERSION
from cachec.runtime.work import claim_work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What to train: a method for one schedule. ``interval`` is recorded if the schedule came from one."""

    method: Method
    schedule: Schedule
    settings: Settings
    prompts: UsedPrompts
    seed: int
    interval: int | None = None

    def check(self) -> PredictorMethod | CodedMethod | BlockMethod:
        """The method, if there is something to train.

        Raises:
            PredictorError: the method has nothing to train.
            InputError: nothing is left to forecast, or there are too few prompts.
        """
        if not isinstance(self.method, PredictorMethod | CodedMethod | BlockMethod) or not self.method.needs_training:
            raise PredictorError(f"method {self.method.name!r} has nothing to train: compile it as it is")
        if not self.schedule.forecast:
            raise InputError(
                f"all {self.settings.steps} steps are computed: there is nothing for {self.method.name} to forecast, "
                "so nothing to train"
            )
        if not self.prompts.places("fit") or not self.prompts.places("stop"):
            raise InputError(
                f"{len(self.prompts.prompts)} prompts are too few to train on some and to stop by others: give more"
            )
        return self.method


def training_facts(model: LoadedModel, method: Method, schedule: Schedule, settings: Settings) -> dict[str, str]:
    """What a predictor must have been trained for to be used with these settings."""
    return {**_schedule_facts(model, method, schedule, settings), WEIGHTS: model.weights_hash}


def find_shipped(model: LoadedModel, method: Method, schedule: Schedule, settings: Settings) -> Parameters | None:
    """The predictor for these settings that ships with the package, if there is one."""
    return find_pretrained(method.name, _schedule_facts(model, method, schedule, settings), lambda: model.weights_hash)


def shipped_for(model: LoadedModel, training: Training, *, own_prompts: bool) -> Parameters | None:
    """The predictor that ships, or ``None``: one is to be trained now, which is said of models that ship.

    None ships for a user's ``own_prompts``.

    Raises:
        PredictorError: the model ships, there is no such predictor of it, and training takes as long as a model's.
    """
    if own_prompts or not model.spec.packaged:
        return None
    found = find_shipped(model, training.method, training.schedule, training.settings)
    if found is None:
        missing, command, file = _none_ships(model, training)
        if isinstance(training.method, BlockMethod):
            raise PredictorError(f"{missing}. Train one: {command}, and pass --predictor {file}; or pass --prompts, and it is "
                                 "trained on them now")  # fmt: skip
        log.warning("%s: it is trained now. %s makes one to keep, for --predictor", missing, command)
    return found


def _none_ships(model: LoadedModel, training: Training) -> tuple[str, str, str]:
    """What is missing, the command that makes it, and the file that it makes."""
    spec, wanted = model.spec, training.method.trained_facts(guided=model.is_guided(training.settings))
    usual = type(training.method)().options()
    changed = {option: value for option, value in training.method.options().items() if value != usual[option]}
    options = "".join(f" --set {option}={value}" for option, value in {**changed, **wanted}.items())
    settings, name, steps = training.settings, training.method.name, training.settings.steps
    size = "" if settings.size == str(PictureSize(spec.width, spec.height, spec.frames)) else f" --size {settings.size}"
    count = "" if steps == spec.steps else f" --steps {steps}"
    schedule = ",".join(map(str, training.schedule.compute))
    which = f"--schedule {schedule}" if training.interval is None else f"--interval {training.interval}"
    file = f"{name}-{spec.name}-{steps}-{training.interval or len(training.schedule.compute)}.safetensors"
    more = "" if models_folder() else f" (and {NAME}, which has more of them, is not installed: {INSTALL})"
    missing = f"no predictor of {name} ships for {spec.name} at {settings.size} with {steps} steps, {which.removeprefix('--')}"
    missing += "".join(f", {option} {value}" for option, value in wanted.items())
    others = [model for model in shipped_models(name) if model != spec.name]
    if others and isinstance(training.method, BlockMethod):
        missing += f" (of {name} there are some for {', '.join(others)})"
    return missing + more, f"cachec train {spec.name} --method {name}{options}{size}{count} {which} -o {file}", file


def _schedule_facts(model: LoadedModel, method: Method, schedule: Schedule, settings: Settings) -> dict[str, str]:
    """What is known at once: all but which weights the model has. Blocks serve every schedule and size."""
    return {"method": method.name} if isinstance(method, BlockMethod) else _made_for(model, method, schedule, settings)


def _made_for(model: LoadedModel, method: Method, schedule: Schedule, settings: Settings) -> dict[str, str]:
    return {
        "method": method.name,
        "steps": str(settings.steps),
        "schedule": ",".join(map(str, schedule.compute)),
        "sigmas": hash_sigmas(model.sampling(settings).sigmas),
        **settings.facts,
        **({"cut": settings.cut} if settings.cut else {}),
        **method.trained_facts(guided=model.is_guided(settings)),
    }


def record_for_training(model: LoadedModel, recorders: Recorders, training: Training, *, work: Path) -> None:
    """Let others record what :func:`train_predictor` then finds in ``work``. Raises as it does."""
    subject, prompts = Subject.of(model, training.settings), training.prompts.prompts
    with claim_work(work, "training", _claimed(model, training, recorders.facts)):
        if isinstance(training.method, BlockMethod):
            record_states(subject, recorders, prompts, seed=training.seed, work=work)
        else:
            record_features(subject, recorders, prompts, seed=training.seed, work=work)


def train_predictor(model: LoadedModel, evaluator: Evaluator, training: Training, *, work: Path) -> Parameters:
    """Train on ``evaluator``'s device, on runs in its precision. Work files go to ``work``; a rerun goes on from them.

    Raises:
        PredictorError: the method has nothing to train.
        InputError: there are too few prompts, nothing to forecast, or ``work`` holds another training.
        OutputError: another process trains in ``work``, or it cannot be written.
    """
    method, prompts, seed = training.check(), training.prompts, training.seed
    if isinstance(method, CodedMethod) and evaluator.feature is not None:
        method.check_channels(evaluator.feature[-1])
    subject = Subject.of(model, training.settings)
    recorders = recording_here(subject, evaluator)
    claimed = _claimed(model, training, recorders.facts)
    with claim_work(work, "training", claimed), watching_memory(f"training {method.name} on {evaluator.device}"):
        if isinstance(method, BlockMethod):
            arrays, found = method.fit(_block_data(model, evaluator, training, subject, recorders, work))
        else:
            runs = record_trajectories(subject, recorders, prompts.prompts, seed=seed, work=work)
            train, held_out = (runs.select(np.array(prompts.places(use))) for use in ("fit", "stop"))
            data = TrainingData(evaluator, subject.own_sampling, train, held_out, training.schedule, seed, work)
            arrays, found = method.fit(data)
    facts = {
        **_known(model, training),
        **found,
        "model": model.spec.name,
        "interval": "none" if training.interval is None else str(training.interval),
        "seed": str(seed),
        "num_prompts": str(len(prompts.prompts)),
        "prompts_sha256": _digest(training),
        "made_by": f"cachec {VERSION}",
        "torch": importlib.metadata.version("torch"),
    }
    return Parameters(arrays, {name: _text(value) for name, value in facts.items()}, "trained now")


def _block_data(
    model: LoadedModel, evaluator: Evaluator, training: Training, subject: Subject, recorders: Recorders, work: Path
) -> BlockData:
    """Recorded latents, the runs to stop by last; with each branch's conditions."""
    prompts = training.prompts
    runs = record_states(subject, recorders, prompts.prompts, seed=training.seed, work=work)
    held_out = prompts.places("stop")
    order, conditions = np.array([*prompts.places("fit"), *held_out]), subject.encode(prompts.prompts)
    branches = [{name: conditions[name][order] for name in model.io.conditions}]
    if model.is_guided(training.settings):
        branches.insert(0, {name: conditions[negative_name(name)][order] for name in model.io.conditions})
    return BlockData(
        model=model,
        settings=training.settings,
        device=str(evaluator.device),
        precision=evaluator.precision,
        sampling=subject.own_sampling,
        states=runs["states"][order],
        branches=branches,
        held_out=len(held_out),
        schedule=training.schedule,
        seed=training.seed,
        work=work,
    )


def _known(model: LoadedModel, training: Training) -> dict[str, str]:
    """What the predictor is for, and how the method is set."""
    facts = _made_for(model, training.method, training.schedule, training.settings)
    if isinstance(training.method, BlockMethod):  # whose predictor is not bound to them
        facts = {name if name == "method" else f"trained_{name}": value for name, value in facts.items()}
    return {**facts, WEIGHTS: model.weights_hash, "options": json.dumps(training.method.options())}


def _digest(training: Training) -> str:
    return hashlib.sha256("\n".join(training.prompts.prompts).encode()).hexdigest()


def _claimed(model: LoadedModel, training: Training, of: RecorderFacts) -> dict[str, str]:
    """What an unfinished training must be of to be gone on with, whoever recorded it."""
    made = {"prompts": _digest(training), "seed": str(training.seed), "device": of.device, "precision": of.precision}
    return {**_known(model, training), **made}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
