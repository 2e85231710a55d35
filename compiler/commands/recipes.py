"""How workers open what is calibrated: a model on its graphs, or a bundle on its engines, each in a process of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachec.compiler.calibration.conditions import load_conditions, subject_of_bundle
from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.runs import Batch, Recorder, RecorderFacts, Subject
from cachec.compiler.calibration.workers import Place, Recipe
from cachec.compiler.commands.messages import set_up_messages
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.compiler.models.lora_files import LoraFile
from cachec.engines import open_bundle
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.specs import Array


def check_torch_device(device: DeviceName) -> None:
    """Raise ``InputError`` unless PyTorch has this device here. Loads PyTorch only when it is asked."""
    from cachec.engines.torch_device import check_device

    check_device(device)


def take_threads(place: Place) -> None:
    """Let PyTorch have a place's threads: those of the models, whatever back end runs the engines."""
    import torch

    if place.threads is not None:
        torch.set_num_threads(place.threads)


@dataclass(frozen=True)
class ModelRecorder(Recipe[RecorderFacts, Batch, dict[str, Array]]):
    """A model by name or directory, with these settings and LoRAs."""

    source: str
    settings: Settings
    loras: tuple[LoraFile, ...] = ()

    @contextmanager
    def open(self, place: Place) -> Iterator[Recorder]:
        from cachec.compiler.frontend import evaluator_of

        set_up_messages()
        take_threads(place)
        model, device = load_model(find_model(self.source), loras=self.loras), DeviceName.parse(place.device or CPU)
        with model.hashing_weights():
            evaluator = evaluator_of(model, self.settings, device)
            subject = Subject.of(model, self.settings)
        yield Recorder(subject, evaluator)


@dataclass(frozen=True)
class BundleRecorder(Recipe[RecorderFacts, Batch, dict[str, Array]]):
    """A bundle, on prompts that a conditions file has."""

    root: Path
    conditions: Path
    size: str | None = None
    steps: int | None = None

    @contextmanager
    def open(self, place: Place) -> Iterator[Recorder]:
        set_up_messages()
        encoded = load_conditions(self.conditions)
        with open_bundle(self.root, device=place.device, size=self.size, steps=self.steps, threads=place.threads) as bundle:
            yield Recorder(subject_of_bundle(bundle, encoded), EngineEvaluator.of(bundle))
