"""Conditions files: what a model's text encoders make of prompts, for machines that have no text encoders, and no torch.

Shapes: ``P`` prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.evaluator import Conditions
from cachec.compiler.calibration.facts_file import FactsFile
from cachec.compiler.calibration.runs import Subject
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.models.base import Settings, settings_of
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.abi import BATCH, COMPUTE
from cachec.runtime.errors import BundleError, InputError, shortened
from cachec.runtime.files import write_file
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import LoadedBundle
from cachec.runtime.specs import Array

FILE = FactsFile("conditions", "cachec-conditions-1", "cachec encode", InputError)


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Conditions by name [P, …] of ``prompts``; ``facts`` say which model's, and ``origin`` where they come from."""

    conditions: Conditions
    prompts: UsedPrompts
    facts: Mapping[str, str]
    origin: str

    def encode(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Conditions by name of some of the prompts.

        Raises:
            InputError: one is not among them.
        """
        places = {prompt: place for place, prompt in enumerate(self.prompts.prompts)}
        if missing := [prompt for prompt in prompts if prompt not in places]:
            raise InputError(
                f"conditions {self.origin} lack {len(missing)} of {len(prompts)} prompts, such as {shortened(missing[0])}: "
                f"make some of the same prompts with {FILE.command}"
            )
        rows = [places[prompt] for prompt in prompts]
        return {name: values[rows] for name, values in self.conditions.items()}

    def check(self, name: str, settings: Settings) -> None:
        """Raise ``InputError`` unless these are conditions of the model ``name`` with these settings."""
        FILE.check(self.facts, conditions_facts(name, settings), self.origin)


def subject_of_bundle(bundle: LoadedBundle, encoded: EncodedPrompts) -> Subject:
    """The model that a bundle was compiled from, where it knows ``encoded`` prompts only.

    Raises:
        InputError: the conditions are of another model or of other settings.
        BundleError: the bundle does not name its sampler.
    """
    encoded.check(bundle.manifest.model["name"], settings_of(bundle.manifest))
    return subject_on_grid(bundle, encoded.encode)


def subject_on_grid(bundle: LoadedBundle, encode: Callable[[Sequence[str]], dict[str, Array]]) -> Subject:
    """The model that a bundle was compiled from, on the bundle's own noise levels; ``encode`` gives conditions of prompts.

    Raises:
        BundleError: the bundle does not name its sampler.
    """
    manifest, uncached = bundle.manifest, bundle.programs[UNCACHED]
    if "sampler" not in manifest.settings:
        raise BundleError("the bundle does not say which sampler it is for: compile it again")

    def sampling(steps: int) -> Sampling:
        if steps != uncached.num_steps:
            raise InputError(
                f"the bundle has the noise levels of its own {uncached.num_steps} steps, not those of {steps}, which take the "
                "model's sampler: calibrate the model itself for them"
            )
        return Sampling.of_program(uncached)

    return Subject(
        name=manifest.model["name"],
        weights_hash=manifest.model["weights_sha256"],
        sampler=manifest.settings["sampler"],
        settings=settings_of(manifest),
        latent_shape=bundle.target.engines[COMPUTE].signature.input(bundle.io.latents).resolve({BATCH: 1})[1:],
        sampling=sampling,
        encode=encode,
    )


def conditions_facts(name: str, settings: Settings) -> dict[str, str]:
    """What conditions must be of, to be given to the model ``name`` with these settings: all that encoding may look at."""
    return {"model": name, **settings.facts}


def save_conditions(conditions: Conditions, prompts: UsedPrompts, facts: Mapping[str, str], path: Path) -> None:
    """Write a conditions file, atomically.

    Raises:
        InputError: conditions of a prompt are not finite.
        OutputError: the place cannot be written.
    """
    for name, values in conditions.items():
        for prompt, value in zip(prompts.prompts, values, strict=True):
            if not np.isfinite(value).all():
                raise InputError(f"{name} of prompt {prompt!r} holds NaN or infinity: check the text encoders, or leave it out")
    write_file(path, FILE.content(conditions, {**facts, **prompts.facts}))


def load_conditions(path: Path) -> EncodedPrompts:
    """Read a conditions file.

    Raises:
        InputError: it is missing, damaged, or something else.
    """
    arrays, facts = FILE.read(path)
    try:
        prompts = UsedPrompts.from_facts(facts)
    except (KeyError, ValueError, TypeError) as error:
        raise FILE.damaged(path, error) from error
    for name, values in arrays.items():
        if values.shape[:1] != (len(prompts.prompts),):
            raise FILE.damaged(path, ValueError(f"{name} is {list(values.shape)} for {len(prompts.prompts)} prompts"))
    return EncodedPrompts(arrays, prompts, facts, str(path))
