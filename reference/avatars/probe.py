"""Reads avatars: do they show what their captions say? ``python -m reference.avatars.probe --out build/reference``.

A small classifier, trained on dataset pictures (or clips) only, with one answer per attribute. It is asked for what a caption
states and nothing else. That of pictures is written as ``probe-pictures.safetensors``, too, which ``cachec eval`` reads.
Colours are those of skin, hair, clothes and background; parts are hair, beard and clothes; expression is the mood; motion is
what a clip's caption ends with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from cachec.compiler.evaluation.probe import CaptionWords, Probe, probe_bytes
from reference.avatars import loop
from reference.avatars.attributes import (
    BACKGROUNDS,
    CLOTHES,
    CLOTHES_COLOURS,
    HAIR_COLOURS,
    HAIRS,
    MOODS,
    SKINS,
    VALUES,
    Look,
)
from reference.avatars.autoencoder import to_input
from reference.avatars.clips import load
from reference.avatars.dataset import read
from reference.avatars.motion import FRAMES, MOVES, Clip

GROUPS = {
    "colours": ("skin", "hair_colour", "clothes_colour", "background"),
    "parts": ("hair", "beard", "clothes"),
    "expression": ("mood",),
    "motion": ("motion",),
}
MOTION_WORDS = (*MOVES, "blinks", *(f"becomes {mood}" for mood in MOODS))
SEEN = (
    0,
    FRAMES // 2,
    FRAMES - 1,
)  # frames of a clip that the reader sees: eyes are closed, or the mood new, in the middle one
PICTURE_HEADS = VALUES
CLIP_HEADS = {**VALUES, "motion": MOTION_WORDS}
COLOURED = ("bun", "bob")  # that captions call by their colour, without "hair"
UNSEEN = -100  # what cross entropy leaves out
SCORED = 500


@dataclass(frozen=True)
class Asked:
    """What can be read off one picture or clip, and which of it the caption states."""

    answers: dict[str, str]
    stated: tuple[str, ...]

    @classmethod
    def of_look(cls, look: Look, stated: Sequence[str]) -> "Asked":
        return cls({name: getattr(look, name) for name in VALUES}, tuple(stated))

    @classmethod
    def of_clip(cls, clip: Clip) -> "Asked":
        """Clips are asked for all that every caption states."""
        answers = {**cls.of_look(clip.look, ()).answers, "motion": clip.words}
        colour = ("hair_colour",) if clip.look.hair != "bald" else ()
        return cls(answers, ("mood", "hair", "beard", "clothes", "clothes_colour", "motion", *colour))


def labels(answers: Mapping[str, Sequence[str]], asked: Sequence[Asked]) -> dict[str, Tensor]:
    """Index of each right answer, by attribute; the hair colour of bald people is not asked."""
    return {
        name: torch.tensor([
            UNSEEN if name == "hair_colour" and one.answers["hair"] == "bald" else words.index(one.answers[name])
            for one in asked
        ])
        for name, words in answers.items()
    }  # fmt: skip


def caption_words() -> CaptionWords:
    """How captions of pictures state each attribute; that nobody has a beard is stated by saying none."""
    phrases: dict[str, dict[str, list[str]]] = {name: {word: [word] for word in words} for name, words in VALUES.items()}
    phrases["skin"] = {skin: [f"{skin} skin"] for skin in SKINS}
    phrases["background"] = {colour: [f"{colour} background"] for colour in BACKGROUNDS}
    phrases["clothes_colour"] = {colour: [f"{colour} {one}" for one in CLOTHES] for colour in CLOTHES_COLOURS}
    phrases["hair_colour"] = {colour: [f"{colour} {one}" for one in ("hair", *COLOURED)] for colour in HAIR_COLOURS}
    for hair in HAIRS:
        forms = [f"{colour} {hair}" if hair in COLOURED else f"{hair} {colour} hair" for colour in HAIR_COLOURS]
        phrases["hair"][hair] = ["no hair"] if hair == "bald" else forms
    return CaptionWords(phrases, ("mood", "hair", "clothes", "clothes_colour"))


def seen(clips: np.ndarray) -> Tensor:
    """Clips, uint8 [B, 9, S, S, 3], as the reader takes them: [B, 9, S, S] in [-1, 1]."""
    return torch.cat([to_input(clips[:, index]) for index in SEEN], 1)


def as_input(samples: np.ndarray) -> Tensor:
    """Pictures, uint8 [B, S, S, 3], or clips [B, 9, S, S, 3], as the reader takes them."""
    return seen(samples) if samples.ndim == 5 else to_input(samples)


@torch.no_grad()
def score(reader: Probe, inputs: Tensor, asked: Sequence[Asked]) -> dict[str, float]:
    """Share of stated attributes that are read as the caption says, by group and by attribute."""
    reader.eval()
    answers, wanted = reader(inputs), labels(reader.answers, asked)
    right = {name: answers[name].argmax(1) == wanted[name] for name in reader.answers}
    hits = {
        name: [bool(right[name][i]) for i, one in enumerate(asked) if name in one.stated] for name in reader.answers
    }  # fmt: skip
    groups = {group: [hit for name in names for hit in hits.get(name, [])] for group, names in GROUPS.items()}
    return {name: round(float(np.mean(found)), 4) for name, found in {**groups, **hits}.items() if found}


class Trainer:
    """Samples, their answers and the reader."""

    def __init__(self, reader: Probe, samples: np.ndarray, asked: Sequence[Asked], steps: int, batch: int = 64) -> None:
        self.reader, self.samples, self.batch = reader, samples, batch
        self.labels = labels(reader.answers, asked)
        self.optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 2e-3, total_steps=steps)
        self.parts = {"reader": reader, "optimizer": self.optimizer, "schedule": self.schedule}

    def update(self, step: int) -> float:
        """Slightly noisy pictures, so that the reader does not depend on pixel-sharp edges."""
        self.reader.train()
        index = np.sort(torch.randint(len(self.samples), (self.batch,)).numpy())
        inputs = as_input(self.samples[index])
        answers = self.reader(inputs + 0.08 * torch.randn_like(inputs))
        loss = sum(nn.functional.cross_entropy(answers[name], self.labels[name][index]) for name in self.reader.answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.item())


def picture_data(name: str, out: Path) -> tuple[np.ndarray, list[Asked]]:
    """``pictures`` or ``held-out``, and what they show."""
    pictures, described = read(name, out)
    return pictures, [Asked.of_look(Look(**each["look"]), each["stated"]) for each in described]


def clip_data(name: str, out: Path) -> tuple[np.ndarray, list[Asked]]:
    """``clips`` or ``held-out-clips``, and what they show."""
    frames, shown, _ = load(name, out)
    return frames, [Asked.of_clip(clip) for clip in shown]


@click.command()
@loop.options
@click.option("--of", "kind", type=click.Choice(["pictures", "clips"]), default="pictures", show_default=True)
@click.option("--steps", default=800, show_default=True)
def main(out: Path, kind: str, steps: int, threads: int) -> None:
    """Train the reader of pictures or of clips, and let it read held-out ones of the dataset: what it gets right itself."""
    torch.set_num_threads(threads)
    torch.manual_seed(9)
    if kind == "pictures":
        samples, asked = picture_data("pictures", out)
        held, held_asked = picture_data("held-out", out)
        reader = Probe(PICTURE_HEADS, samples.shape[1])
    else:
        samples, asked = clip_data("clips", out)
        held, held_asked = clip_data("held-out-clips", out)
        reader = Probe(CLIP_HEADS, samples.shape[2], 3 * len(SEEN))
    trainer, inputs = Trainer(reader, samples, asked, steps), as_input(held[:SCORED])

    def watch(step: int) -> dict[str, float]:
        return score(reader, inputs, held_asked[:SCORED])

    loop.Training(f"probe-{kind}", out, steps, trainer.parts, trainer.update, watch, seed=9).run()
    (out / f"probe-{kind}.json").write_text(json.dumps(watch(steps), indent=1) + "\n")
    if kind == "pictures":
        (out / "probe-pictures.safetensors").write_bytes(probe_bytes(reader, caption_words()))


if __name__ == "__main__":
    main()
