"""Prompt lists. Those for training and calibration, for measuring and for evaluation share no prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cachec.runtime.errors import InputError
from cachec.runtime.files import read_text_file

DIRECTORY = Path(__file__).parent / "prompts"


def default_prompts(name: str, use: Literal["train", "choose", "measure", "eval"]) -> list[str]:
    """The list ``name`` that ships with the package, for one use."""
    return read_prompts(DIRECTORY / f"{name}-{use}.txt")


def has_prompts(name: str, use: Literal["choose"]) -> bool:
    """Is there a list ``name`` for this use? Only small models, which run many prompts in minutes, have one to choose by."""
    return (DIRECTORY / f"{name}-{use}.txt").is_file()


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped.

    Raises:
        InputError: the file is missing, is not UTF-8, or holds no prompt.
    """
    prompts = [line.strip() for line in read_text_file(path, "prompts file").split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt: write one prompt a line")
    return prompts


@dataclass(frozen=True)
class PromptSplit:
    """Prompts to fit on, to stop by (or choose by), and to measure on."""

    fit: tuple[str, ...]
    stop: tuple[str, ...]
    measure: tuple[str, ...]


def split_prompts(prompts: Sequence[str]) -> PromptSplit:
    """Divide prompts 2 : 1 : 1 by a hash of their text: a prompt has the same use in every file."""
    parts: list[list[str]] = [[], [], []]
    for prompt in prompts:
        parts[(0, 0, 1, 2)[hashlib.sha256(prompt.encode()).digest()[0] % 4]].append(prompt)
    return PromptSplit(*map(tuple, parts))
