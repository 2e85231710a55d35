"""Reads what a model's pictures show: a small classifier, trained on pictures of the model's data set only.

It is asked for what a caption states and for nothing else. What there is to read, the answers, and the phrases by which a
caption states them lie in the probe's file beside its weights; ``reference/avatars/probe.py`` trains the one of tiny-flux.

Shapes: ``B`` pictures, ``S`` pixels of a side, ``C`` channels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cachec.runtime.errors import ModelUnavailableError
from cachec.runtime.specs import Array

FORMAT = "cachec-probe-1"
WIDTHS = (16, 32, 64, 96, 96)  # channels after each halving


@dataclass(frozen=True)
class CaptionWords:
    """What captions state: by attribute and answer, the phrases that say it.

    The empty phrase says what goes without saying. Where several answers are said, one whose phrase is a part of another's
    gives way ("beard" to "long beard"); of two that are left neither is stated. ``needed`` are attributes without which a text
    is no caption that can be checked.
    """

    phrases: Mapping[str, Mapping[str, Sequence[str]]]
    needed: Sequence[str]

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """What can be answered, by attribute."""
        return {name: tuple(answers) for name, answers in self.phrases.items()}

    def stated(self, caption: str) -> dict[str, str] | None:
        """The answers that a caption states, by attribute; ``None`` if it cannot be checked."""
        words = " ".join(["", *re.findall(r"\w+|[^\w\s]", caption.lower()), ""])
        found = {name: answer for name, known in self.phrases.items() if (answer := _said(known, words)) is not None}
        return found if all(name in found for name in self.needed) else None


def _said(phrases: Mapping[str, Sequence[str]], words: str) -> str | None:
    """The one answer of ``phrases`` that ``words`` say, a space before and after each."""
    said = [(phrase, answer) for answer, known in phrases.items() for phrase in known if not phrase or f" {phrase} " in words]
    most = {
        answer
        for phrase, answer in said
        if not any(phrase != other and (not phrase or f" {phrase} " in f" {other} ") for other, _ in said)
    }
    return most.pop() if len(most) == 1 else None


class Probe(nn.Module):
    """Five strided convolutions and one linear head per attribute, for pictures of ``side`` pixels, which 32 divides."""

    def __init__(self, answers: Mapping[str, Sequence[str]], side: int, channels: int = 3) -> None:
        super().__init__()
        self.answers, self.side, self.channels = {name: tuple(known) for name, known in answers.items()}, side, channels
        layers: list[nn.Module] = []
        for a, b in zip((channels, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        size = WIDTHS[-1] * (side // 32) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(size, len(known)) for name, known in self.answers.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """A number for each answer, by attribute, for [B, C, S, S] in [-1, 1]."""
        body = self.body(pictures)
        return {name: head(body) for name, head in self.heads.items()}


@dataclass(frozen=True)
class PictureReader:
    """A trained probe, and what captions ask it for."""

    probe: Probe
    words: CaptionWords

    @torch.no_grad()
    def read(self, picture: Array) -> dict[str, str]:
        """What a picture [S, S, 3] in [0, 1] shows, by attribute."""
        given = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] * 2 - 1
        return {name: self.probe.answers[name][int(found.argmax())] for name, found in self.probe(given).items()}

    def score(self, picture: Array, caption: str) -> dict[str, bool]:
        """Is it read as the caption says? By attribute, those that the caption states."""
        stated = self.words.stated(caption)
        if not stated:
            return {}
        shown = self.read(picture)
        return {name: shown[name] == answer for name, answer in stated.items()}


def probe_bytes(probe: Probe, words: CaptionWords) -> bytes:
    """The content of a probe file: weights in float16, which reads as well."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in probe.state_dict().items()
    }
    facts = {
        "format": FORMAT,
        "side": str(probe.side),
        "phrases": json.dumps(words.phrases),
        "needed": json.dumps(list(words.needed)),
    }
    content: bytes = save(tensors, facts)
    return content


def load_probe(path: Path) -> PictureReader:
    """Read a probe file.

    Raises:
        ModelUnavailableError: it is missing, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, not {FORMAT!r}")  # noqa: TRY301
        words = CaptionWords(json.loads(facts["phrases"]), tuple(json.loads(facts["needed"])))
        probe = Probe(words.answers, int(facts["side"]))
        probe.load_state_dict(tensors)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ModelUnavailableError(f"{path} does not hold a probe: {error}") from error
    return PictureReader(probe.eval(), words)
