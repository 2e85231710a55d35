"""Prompt lists. Those for training and calibration and those for evaluation share no prompt."""

from pathlib import Path
from typing import Literal

from cachec.runtime.errors import InputError

DIRECTORY = Path(__file__).parent / "prompts"


def default_prompts(name: str, use: Literal["train", "eval"]) -> list[str]:
    """The list ``name`` that ships with the package, for one use."""
    return read_prompts(DIRECTORY / f"{name}-{use}.txt")


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped.

    Raises:
        InputError: the file is missing, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts file {path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"prompts file {path} holds no prompt: write one prompt a line")
    return prompts
