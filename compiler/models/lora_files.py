"""LoRA files as they are asked for: which, and how much of each. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cachec.runtime.errors import InputError

PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class LoraFile:
    """A file that is to be fused, ``scale`` times what it says itself; ``part``: which transformer, where there are two."""

    path: Path
    scale: float = 1.0
    part: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """As it is written: ``FILE``, ``FILE:SCALE``, and ``FILE@transformer_2:SCALE``.

        Raises:
            InputError: there is no such file, it is of a format that is not read, or the scale is no number.
        """
        front, _, number = text.rpartition(":")
        is_scaled = not Path(text).exists() and any(Path(one).exists() for one in (front, front.rpartition("@")[0]) if one)
        name, scale = (front, _number(number, text)) if is_scaled else (text, 1.0)
        whole, _, part = name.rpartition("@")
        path, of = (Path(whole), part) if whole and not Path(name).exists() else (Path(name), None)
        if not path.is_file():
            raise InputError(f"lora {text}: there is no such file. Give FILE.safetensors, or FILE.safetensors:SCALE")
        if path.suffix in PICKLED:
            raise InputError(
                f"lora {path} is no safetensors file, and what others hold may run code: convert it with python -c "
                f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{path.name}', weights_only=True), "
                f"'{path.stem}.safetensors')\""
            )
        return cls(path.absolute(), scale, of)


def as_option(lora: Mapping[str, Any]) -> str:
    """What a manifest says of a fused file, as :meth:`LoraFile.parse` takes it."""
    part = f"@{lora['part']}" if "part" in lora else ""
    return f"{lora['name']}{part}:{lora['scale']:g}"


def _number(text: str, given: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or not scale:
        raise InputError(f"lora {given}: the scale {text!r} must be a number other than 0")
    return scale


def parse_loras(texts: Sequence[str]) -> tuple[LoraFile, ...]:
    """All that are asked for.

    Raises:
        InputError: one cannot be used, or is given twice.
    """
    files = tuple(map(LoraFile.parse, texts))
    places = [(file.path.resolve(), file.part) for file in files]
    for file, place in zip(files, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"lora {file.path} is given twice: give it once, with the sum of the scales")
    return files
