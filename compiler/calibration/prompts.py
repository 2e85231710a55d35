"""Prompt lists. Those for training and calibration and those for evaluation share no prompt."""

from pathlib import Path
from typing import Literal

from cachec.runtime.errors import InputError
from cachec.runtime.files import read_text_file

DIRECTORY = Path(__file__).parent / "prompts"


def default_prompts(name: str, use: Literal["train", "eval"]) -> list[str]:
    """The list ``name`` that ships with the package, for one use."""
    return read_prompts(DIRECTORY / f"{name}-{use}.txt")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped.

    Raises:
        InputError: the file is missing, is not UTF-8, or holds no prompt.
    """
    prompts = [line.strip() for line in read_text_file(path, "prompts file").split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt: write one prompt a line")
    return prompts
