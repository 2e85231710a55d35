"""What an avatar looks like, and how a caption says it.

A ``Look`` holds exact attributes; ``options`` are the renderer's, ``caption`` is plain English that states some of them: always
mood, hair and clothes, mostly the rest. What a caption leaves open, and where exactly the head stands, is left to the
generator's noise. The tenth of all combinations of mood, hair and clothes that ``is_held_out`` names, chosen by a hash, is
never trained on; so a held-out caption describes people of whom training saw neither caption nor picture.

Art: "ToonHead" by Johan Melin, CC BY 4.0. The values are those that one can tell apart at 128 pixels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HELD_OUT_PERCENT = 10
MAX_WORDS = 24  # of a picture's caption, punctuation counted

MOODS: dict[str, tuple[str, str, str]] = {  # eyes, eyebrows, mouth
    "smiling": ("happy", "neutral", "smile"),
    "laughing": ("bow", "raised", "laugh"),
    "angry": ("wide", "angry", "angry"),
    "sad": ("wide", "sad", "sad"),
    "surprised": ("wide", "raised", "agape"),
    "sleepy": ("humble", "neutral", "smile"),
    "winking": ("wink", "happy", "laugh"),
}
SKINS = {"light": "f1c3a5", "brown": "b4785a", "dark": "74462f"}
HAIRS: dict[str, tuple[str | None, str | None]] = {  # hair, rear hair
    "bald": (None, None),
    "short": ("sideComed", None),
    "cropped": ("undercut", None),
    "spiky": ("spiky", None),
    "bun": ("bun", None),
    "long": ("sideComed", "longStraight"),
    "wavy": ("sideComed", "longWavy"),
    "bob": ("sideComed", "neckHigh"),
}
HAIR_COLOURS = {
    "black": "2c1b18",
    "blue": "4a7be0",
    "ginger": "c8581c",
    "blond": "e3bf5f",
    "white": "e9e9ea",
    "pink": "ec6fb0",
}
BEARDS = {"": None, "moustache": "moustacheTwirl", "beard": "fullBeard", "long beard": "longBeard"}
CLOTHES = {"turtleneck": "turtleNeck", "jacket": "openJacket", "top": "dress", "cardigan": "shirt", "tee": "tShirt"}
CLOTHES_COLOURS = {
    "red": "b11f1f",
    "orange": "f97316",
    "yellow": "eab308",
    "green": "147f3c",
    "blue": "1d4fd0",
    "purple": "731ac3",
    "black": "151613",
    "white": "e8e9e6",
}
BACKGROUNDS = {
    "blue": "8fd0f0",
    "pink": "f7b6c9",
    "green": "a9dfa0",
    "yellow": "fbe38e",
    "grey": "b4b8bf",
    "navy": "26345c",
}
VALUES: dict[str, tuple[str, ...]] = {
    "mood": tuple(MOODS),
    "skin": tuple(SKINS),
    "hair": tuple(HAIRS),
    "hair_colour": tuple(HAIR_COLOURS),
    "beard": tuple(BEARDS),
    "clothes": tuple(CLOTHES),
    "clothes_colour": tuple(CLOTHES_COLOURS),
    "background": tuple(BACKGROUNDS),
}
CORE = ("mood", "hair", "hair_colour", "clothes", "clothes_colour")  # what every caption states and the split is made by


@dataclass(frozen=True)
class Look:
    """One person, in the words of ``VALUES``. A bald person's ``hair_colour`` is that of brows and beard."""

    mood: str
    skin: str
    hair: str
    hair_colour: str
    beard: str
    clothes: str
    clothes_colour: str
    background: str

    def options(self) -> dict[str, object]:
        """The renderer's options, one value each."""
        eyes, eyebrows, mouth = MOODS[self.mood]
        hair, rear = HAIRS[self.hair]
        parts = {"hair": hair, "rearHair": rear, "beard": BEARDS[self.beard]}
        optional = {name: [value] for name, value in parts.items() if value}
        return {
            **optional,
            **{f"{name}Probability": 100 if value else 0 for name, value in parts.items()},
            "eyes": [eyes],
            "eyebrows": [eyebrows],
            "mouth": [mouth],
            "clothes": [CLOTHES[self.clothes]],
            "clothesColor": [CLOTHES_COLOURS[self.clothes_colour]],
            "hairColor": [HAIR_COLOURS[self.hair_colour]],
            "skinColor": [SKINS[self.skin]],
            "backgroundColor": [BACKGROUNDS[self.background]],
        }


@dataclass(frozen=True)
class Saying:
    """A caption and the attributes that it states, which are those that a reader may be asked for."""

    caption: str
    stated: tuple[str, ...]


def is_held_out(look: Look) -> bool:
    """True for the tenth of all combinations of mood, hair and clothes that training never sees."""
    core = [getattr(look, name) for name in CORE]
    if look.hair == "bald":
        core[CORE.index("hair_colour")] = ""  # no caption states it
    return hashlib.sha256(" ".join(core).encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def sample_look(rng: np.random.Generator, *, held_out: bool) -> Look:
    """Draw a look on the asked side of the split; six in ten have no beard."""
    while True:
        drawn = {name: str(values[rng.integers(len(values))]) for name, values in VALUES.items()}
        if rng.random() < 0.5:
            drawn["beard"] = ""
        look = Look(**drawn)
        if is_held_out(look) == held_out:
            return look


def looks(seed: int, *, held_out: bool) -> Iterator[Look]:
    """An endless stream of looks, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_look(rng, held_out=held_out)


def _hair_words(look: Look) -> str:
    colour = look.hair_colour
    forms = {"bald": "no hair", "bun": f"a {colour} bun", "bob": f"a {colour} bob"}
    return forms.get(look.hair, f"{look.hair} {colour} hair")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def say(look: Look, rng: np.random.Generator) -> Saying:
    """One of several sentences about ``look``; skin is left out in four of ten, the background in two of ten."""
    mood = look.mood
    skin, background = rng.random() < 0.6, rng.random() < 0.8
    person = ("person", "face", "character")[rng.integers(3)]
    has = [f"{look.skin} skin"] * skin + [_hair_words(look)] + [f"a {look.beard}"] * bool(look.beard)
    owns = " , ".join(has[:-1]) + " and " + has[-1] if len(has) > 1 else has[0]
    wears = f"{_article(look.clothes_colour)} {look.clothes_colour} {look.clothes}"
    before = f"{_article(look.background)} {look.background} background" if background else ""
    form = rng.integers(4)
    if form == 0:
        caption = f"{_article(mood)} {mood} {person} with {owns} in {wears}" + f" on {before}" * background
    elif form == 1:
        caption = f"{_article(mood)} {mood} {person} in {wears} with {owns}" + f" on {before}" * background
    elif form == 2:
        caption = f"{owns} , {wears} , {mood}" + f" , {before}" * background
    else:
        caption = f"on {before} " * background + f"{_article(mood)} {mood} {person} wearing {wears} , with {owns}"
    stated = [name for name in VALUES if name not in ("skin", "hair_colour", "background")]
    stated += ["skin"] * skin + ["background"] * background + ["hair_colour"] * (look.hair != "bald")
    return Saying(caption, tuple(stated))


def vocabulary() -> list[str]:
    """Every word and mark that a caption of a picture or a video can hold, sorted."""
    values = [value for name, options in VALUES.items() for value in options]
    frame = "a an with and in on wearing , no hair skin background person face character"
    motion = "who moves turns tilts left right up down blinks becomes"
    return sorted({word for phrase in (*values, frame, motion) for word in phrase.split()})
