"""Reads pictures of tiny-flux: do they show what their captions say? A small classifier, trained on drawn pictures only.

The probe looks at one item at a time: it gets the picture and is asked for the item on the first or the second place of
the caption, and answers colour, shape, texture and place. ``reference/probe.py`` trains it.

Shapes: ``B`` pictures, ``N`` items.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from cachec.runtime.errors import ModelUnavailableError
from cachec.runtime.specs import Array

SIDE = 64  # pixels
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "above")
# what the probe can answer, by attribute; a place is that of a single item, or first or second of a relation
HEADS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"),
    "shape": ("circle", "square", "triangle", "ring", "cross"),
    "texture": ("plain", "striped"),
    "place": (*PLACES, *(f"{relation} {i}" for relation in RELATIONS for i in (0, 1))),
}
_ITEM = rf"({'|'.join(HEADS['colour'])})( striped)? ({'|'.join(HEADS['shape'])})"
_BACKGROUND = r"on a (?:dark|grey|brown) background"
_SINGLE = re.compile(rf"a (?:small|large) {_ITEM} at the ({'|'.join(PLACES)}) {_BACKGROUND}")
_PAIR = re.compile(rf"an? {_ITEM} ({'|'.join(RELATIONS)}) an? {_ITEM} {_BACKGROUND}")


@dataclass(frozen=True)
class ItemWords:
    """What a caption says of one item; ``place`` as in ``HEADS``."""

    colour: str
    shape: str
    texture: str
    place: str

    def labels(self) -> dict[str, int]:
        """Index of each word among the answers of its head."""
        return {name: words.index(getattr(self, name)) for name, words in HEADS.items()}


def parse_caption(caption: str) -> tuple[ItemWords, ...] | None:
    """The items of a caption in order; ``None`` if it does not follow the grammar of tiny-flux's captions."""
    if single := _SINGLE.fullmatch(caption):
        colour, striped, shape, place = single.groups()
        return (_item(colour, striped, shape, place),)
    if pair := _PAIR.fullmatch(caption):
        colour, striped, shape, relation, colour_1, striped_1, shape_1 = pair.groups()
        return _item(colour, striped, shape, f"{relation} 0"), _item(colour_1, striped_1, shape_1, f"{relation} 1")
    return None


def _item(colour: str, striped: str | None, shape: str, place: str) -> ItemWords:
    return ItemWords(colour, shape, "striped" if striped else "plain", place)


class Probe(nn.Module):
    """Five convolutions and one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 32, 48, 64, 96, 128]
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 4, len(words)) for name, words in HEADS.items()})

    def forward(self, pictures: torch.Tensor, which: torch.Tensor) -> dict[str, torch.Tensor]:
        """Answers by attribute for pictures [N, 3, 64, 64] in [-1, 1], asked for item ``which`` [N] of each."""
        plane = which.float()[:, None, None, None].expand(-1, 1, *pictures.shape[2:])
        body = self.body(torch.cat([pictures, plane], dim=1))
        return {name: head(body) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Score:
    """Share of ``num_items`` items that were read as the caption says, by attribute; ``skipped`` captions say no item."""

    accuracy: dict[str, float]
    num_items: int
    skipped: int


@torch.no_grad()
def score_pictures(probe: Probe, pictures: Array, captions: Sequence[str]) -> Score:
    """Read ``pictures`` [B, 64, 64, 3] in [0, 1] with their captions."""
    inputs = torch.from_numpy(np.asarray(pictures, np.float32)).permute(0, 3, 1, 2) * 2 - 1
    parsed = [parse_caption(caption) for caption in captions]
    asked = [(index, which, item) for index, items in enumerate(parsed) for which, item in enumerate(items or ())]
    skipped = sum(items is None for items in parsed)
    if not asked:
        return Score({}, 0, skipped)
    answers = probe(inputs[[index for index, _, _ in asked]], torch.tensor([which for _, which, _ in asked]))
    wanted = [item.labels() for _, _, item in asked]
    hits = {name: answers[name].argmax(1) == torch.tensor([labels[name] for labels in wanted]) for name in HEADS}
    return Score({name: hit.float().mean().item() for name, hit in hits.items()}, len(asked), skipped)


def probe_bytes(probe: Probe) -> bytes:
    """The content of a probe file: weights in float16, which reads as well."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in probe.state_dict().items()
    }
    content: bytes = save(tensors)
    return content


def load_probe(path: Path) -> Probe:
    """Read a probe file.

    Raises:
        ModelUnavailableError: it is missing, or holds something else.
    """
    probe = Probe()
    try:
        probe.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailableError(f"{path} does not hold the probe of tiny-flux: {error}") from error
    return probe.eval()
