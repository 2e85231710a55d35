"""Captioned pictures of coloured shapes, drawn by formula and deterministic from a seed.

A scene is one shape at a named place, or two shapes with a named relation, over a shaded background. Everything
that the caption says can be read back from the picture, so a probe can score a generator (``reference/probe.py``);
everything that it does not say (jitter, shading, angle of the stripes) is left to the generator's noise.

Captions are split into training and held-out ones by a hash of the caption, so no held-out caption is ever trained on.

Shapes: ``S = 64`` is the side in pixels; pictures are ``[S, S, 3]`` float32 in [0, 1].
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 64
HELD_OUT_PERCENT = 10

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.90, 0.20),
    "green": (0.13, 0.66, 0.25),
    "cyan": (0.20, 0.80, 0.88),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.56, 0.18, 0.74),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped")
SIZES: dict[str, float] = {"small": 9.5, "large": 14.0}  # radius in pixels
PLACES: dict[str, tuple[float, float]] = {  # centre (x, y) in pixels
    "left": (18, 32),
    "right": (46, 32),
    "top": (32, 18),
    "bottom": (32, 46),
    "centre": (32, 32),
}
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((17, 32), (47, 32)),
    "above": ((32, 17), (32, 47)),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "dark": (0.10, 0.11, 0.14),
    "grey": (0.45, 0.46, 0.48),
    "brown": (0.34, 0.22, 0.15),
}
PAIR_RADIUS = 11.0


@dataclass(frozen=True)
class Item:
    """One shape of a scene, in the caption's words."""

    shape: str
    colour: str
    texture: str

    def words(self) -> str:
        return " ".join(w for w in (self.colour, self.texture, self.shape) if w != "plain")


@dataclass(frozen=True)
class Scene:
    """What a caption says: one item at ``place`` in ``size``, or two items in a ``place`` that is a relation."""

    items: tuple[Item, ...]
    place: str
    size: str
    background: str

    def caption(self) -> str:
        if len(self.items) == 1:
            return f"a {self.size} {self.items[0].words()} at the {self.place} on a {self.background} background"
        first, second = (item.words() for item in self.items)
        return f"{_article(first)} {first} {self.place} {_article(second)} {second} on a {self.background} background"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def is_held_out(caption: str) -> bool:
    """True for the tenth of all captions that training never sees."""
    return hashlib.sha256(caption.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def sample_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """Draw a scene whose caption is on the asked side of the split."""
    while True:
        num_items = 1 if rng.random() < 0.6 else 2
        items = tuple(
            Item(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(TEXTURES, p=(0.6, 0.4))))
            for _ in range(num_items)
        )
        place = str(rng.choice(list(PLACES if num_items == 1 else RELATIONS)))
        scene = Scene(items, place, str(rng.choice(list(SIZES))), str(rng.choice(list(BACKGROUNDS))))
        if num_items == 2 and items[0].colour == items[1].colour:
            continue
        if is_held_out(scene.caption()) == held_out:
            return scene


def scenes(seed: int, *, held_out: bool) -> Iterator[Scene]:
    """An endless stream of scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, held_out=held_out)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = itertools.chain(
        COLOURS, SHAPES, TEXTURES, SIZES, PLACES, RELATIONS, BACKGROUNDS, ("a an", "at the", "on a", "background")
    )
    return sorted({word for phrase in phrases for word in phrase.split()})


_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def _distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], r: float) -> NDArray[np.float32]:
    """Signed distance in pixels to the outline, negative inside; ``x``, ``y`` relative to the centre."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.55 * r, y - 0.75 * r)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.28 * r
    bar = 0.32 * r
    return np.minimum(np.maximum(np.abs(x) - r, np.abs(y) - bar), np.maximum(np.abs(x) - bar, np.abs(y) - r))  # cross


def _texture(texture: str, x: NDArray[np.float32], y: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Share of the item's own colour at each pixel; the rest is a darker tone of it."""
    if texture == "striped":
        angle, phase = rng.choice([0.0, np.pi / 4, np.pi / 2]), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi / 7 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        return np.clip(0.5 + 1.6 * wave, 0, 1)
    return np.ones_like(x)


def _paint(picture: NDArray[np.float32], item: Item, centre: tuple[float, float], r: float, rng: np.random.Generator) -> None:
    cx, cy = np.asarray(centre) + rng.uniform(-1.5, 1.5, 2)
    x, y = _X - np.float32(cx), _Y - np.float32(cy)
    r = r * rng.uniform(0.94, 1.06)
    cover = np.clip(0.5 - _distance(item.shape, x, y, r), 0, 1)[..., None]
    share = _texture(item.texture, x, y, rng)[..., None]
    colour = np.asarray(COLOURS[item.colour], np.float32)
    light = (1.0 - 0.10 * (x + y) / (2 * r))[..., None]
    picture += cover * (np.clip((share + (1 - share) * 0.38) * colour * light, 0, 1) - picture)


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw ``scene``; ``rng`` decides what the caption leaves open. Returns [S, S, 3] in [0, 1]."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = ((_X - SIDE / 2) * np.cos(angle) + (_Y - SIDE / 2) * np.sin(angle)) / SIDE
    base = np.asarray(BACKGROUNDS[scene.background], np.float32)
    picture = np.clip(base * (1 + 0.7 * ramp[..., None]), 0, 1).astype(np.float32)
    if len(scene.items) == 1:
        _paint(picture, scene.items[0], PLACES[scene.place], SIZES[scene.size], rng)
    else:
        for item, centre in zip(scene.items, RELATIONS[scene.place], strict=True):
            _paint(picture, item, centre, PAIR_RADIUS, rng)
    return picture.astype(np.float32)
