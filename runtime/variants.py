"""Variants: a bundle may be for several sizes and several numbers of steps."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from cachec.runtime.errors import InputError, shortened

SEVERAL = "+"  # between sizes of pictures, and lengths of texts, that engines are for
_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?")


@dataclass(frozen=True)
class PictureSize:
    """Width and height in pixels and, of a video, the number of frames; in text ``832x480`` or ``832x480x81``."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``WIDTHxHEIGHT`` or ``WIDTHxHEIGHTxFRAMES``.

        Raises:
            InputError: it is neither.
        """
        found = _SIZE.fullmatch(text.strip().lower())
        if found is None:
            raise InputError(
                f"size {shortened(text)} is not of the form WIDTHxHEIGHT, such as 832x1216, or 832x480x81 of a video"
            )
        return cls(*(int(number) for number in found.groups(default="1")))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """That of a manifest's settings."""
        return cls(settings["width"], settings["height"], settings.get("frames", 1))


@dataclass(frozen=True)
class Variant:
    """One size with one number of steps: which ``settings`` and ``facts`` of the manifest differ, and all ``programs``."""

    settings: Mapping[str, Any]
    programs: Mapping[str, Mapping[str, str]]
    facts: Mapping[str, Any]

    @property
    def size(self) -> str:
        return str(PictureSize.of(self.settings))

    @property
    def steps(self) -> int:
        steps: int = self.settings["steps"]
        return steps


def name_shapes(sizes: Sequence[str], texts: Sequence[int]) -> str:
    """Which sizes of pictures and lengths of texts engines are for, in text: ``832x1216+1024x1024, 64+512 text tokens``."""
    return f"{SEVERAL.join(sizes)}, {SEVERAL.join(map(str, texts))} text tokens"


def read_shapes(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The sizes and the lengths of texts that :func:`name_shapes` names; no length where none is said."""
    sizes, _, texts = name.partition(",")
    numbers = "".join(texts.split()[:1]).split(SEVERAL)
    return tuple(sizes.split(SEVERAL)), tuple(int(number) for number in numbers if number.isdecimal())


def label_of_shapes(name: str) -> str:
    """The same for names of files: ``832x1216+1024x1024-64+512``."""
    sizes, texts = read_shapes(name)
    return "-".join(SEVERAL.join(map(str, part)) for part in (sizes, texts) if part)


def find_text(texts: Sequence[int], wanted: int | None) -> int:
    """The wanted one of the ``texts``' lengths; the longest for ``None``.

    Raises:
        InputError: it is none of them; with those that there are.
    """
    if wanted is None:
        return max(texts)
    if wanted not in texts:
        raise _not_there("text-tokens", wanted, sorted(texts))
    return wanted


def find_variant(variants: Iterable[Variant], size: str | None, steps: int | None) -> int:
    """Which of the variants has this size and this number of steps; ``None`` is that of the first.

    Raises:
        InputError: none has; with those that there are.
    """
    known = list(variants)
    wanted_size = known[0].size if size is None else str(PictureSize.parse(size))
    wanted_steps = known[0].steps if steps is None else steps
    found = [place for place, one in enumerate(known) if (one.size, one.steps) == (wanted_size, wanted_steps)]
    if not found:
        of_size = [one.steps for one in known if one.size == wanted_size]
        raise (
            _not_there("steps", wanted_steps, of_size) if of_size else _not_there("size", wanted_size, [v.size for v in known])
        )
    return found[0]


def _not_there(what: str, wanted: object, there: Iterable[object]) -> InputError:
    names = [str(one) for one in dict.fromkeys(there)]
    return InputError(
        f"{what} is {wanted}, but the bundle was compiled for {', '.join(names)}: take one of them, or compile with "
        f"--{what} {','.join([*names, str(wanted)])}"
    )
