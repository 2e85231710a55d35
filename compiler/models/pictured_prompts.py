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
    texts, pictures = [], []
    for prompt in prompts:
        found = PICTURED.fullmatch(prompt)
        if found is None:
            raise InputError(f"prompt {shortened(prompt)} names no picture to start from: begin with its file in brackets, as "
                             "'[cat.png] make it red'")  # fmt: skip
        try:
            with Image.open(found["file"]) as picture:
                pictures.append(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        except UnidentifiedImageError as error:
            raise InputError(f"{found['file']} is no picture that can be read: take a PNG or JPEG file") from error
        except OSError as error:
            raise InputError(f"picture {found['file']} cannot be read: {reason_of(error)}") from error
        texts.append(found["text"])
    return texts, pictures
