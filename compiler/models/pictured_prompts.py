"""Prompts of models that edit: a picture's file in brackets, and what is to become of it, as ``[cat.png] make it red``."""

import re
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from cachec.runtime.errors import InputError, shortened
from cachec.runtime.files import reason_of

PICTURED = re.compile(r"\s*\[(?P<file>[^\]]+)\]\s*(?P<text>.*)", re.DOTALL)


def read_pictured(prompts: Sequence[str], width: int, height: int) -> tuple[list[str], list[Image.Image]]:
    """The texts, and the pictures, scaled to ``width`` and ``height`` pixels.

    Raises:
        InputError: a prompt names no picture, or one that cannot be read.
    """
    parts = [_parts(prompt) for prompt in prompts]
    return [text for _, text in parts], [_picture(file, width, height) for file, _ in parts]


def on_pictures_of(prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Each of the texts, on the picture of its prompt."""
    return [f"[{_parts(prompt)[0]}] {text}" for prompt, text in zip(prompts, texts, strict=True)]


def _parts(prompt: str) -> tuple[str, str]:
    """File and text."""
    if (found := PICTURED.fullmatch(prompt)) is None:
        raise InputError(f"prompt {shortened(prompt)} names no picture to start from: begin with its file in brackets, as "
                         "'[cat.png] make it red'")  # fmt: skip
    return found["file"], found["text"]


def _picture(file: str, width: int, height: int) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except UnidentifiedImageError as error:
        raise InputError(f"{file} is no picture that can be read: take a PNG or JPEG file") from error
    except OSError as error:
        raise InputError(f"picture {file} cannot be read: {reason_of(error)}") from error
