"""Conditions files: what a model's text encoders make of prompts, for machines that have no text encoders, and no torch.

Shapes: ``P`` prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.compiler.calibration.evaluator import Conditions
from cachec.compiler.calibration.facts_file import FactsFile
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.models.base import Settings
from cachec.runtime.errors import InputError
from cachec.runtime.files import write_file

FILE = FactsFile("conditions", "cachec-conditions-1", "cachec encode", InputError)


@dataclass(frozen=True, eq=False)
class EncodedPrompts:
    """Conditions by name [P, …] of ``prompts``; ``facts`` say which model's, and ``origin`` where they come from."""

    conditions: Conditions
    prompts: UsedPrompts
    facts: Mapping[str, str]
    origin: str

    def check(self, name: str, settings: Settings) -> None:
        """Raise ``InputError`` unless these are conditions of the model ``name`` with these settings."""
        FILE.check(self.facts, conditions_facts(name, settings), self.origin)


def conditions_facts(name: str, settings: Settings) -> dict[str, str]:
    """What conditions must be of, to be given to the model ``name`` with these settings: all that encoding may look at."""
    return {"model": name, **{key: str(getattr(settings, key)) for key in ("height", "width", "text_tokens", "guidance")}}


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
