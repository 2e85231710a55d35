"""Heads that move: nine frames of a person, and how a caption says what happens.

A clip is one motion from beginning to end: the figure moves, the head turns or tilts, the eyes blink, or the mood changes. The
caption is a picture's with the motion after it. Both looks of a person whose mood changes are on the same side of the split.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from reference.avatars.attributes import MAX_WORDS, MOODS, Look, is_held_out, sample_look, say
from reference.avatars.render import Pose

FRAMES = 9
CLIP_SIDE = 96  # pixels
CLIP_WORDS = MAX_WORDS + 4
OPEN_EYES = ("smiling", "angry", "sad", "surprised")  # moods whose blinking shows
# field of the pose, and where it stands in the first and the last frame
MOVES: dict[str, tuple[str, float, float]] = {
    "moves left": ("dx", 70.0, -70.0),
    "moves right": ("dx", -70.0, 70.0),
    "moves up": ("dy", 60.0, -50.0),
    "moves down": ("dy", -50.0, 60.0),
    "turns left": ("turn", 0.0, -48.0),
    "turns right": ("turn", 0.0, 48.0),
    "tilts left": ("tilt", 0.0, -16.0),
    "tilts right": ("tilt", 0.0, 16.0),
}
MOTIONS = (*MOVES, "blinks", "becomes")
BLINK = (3, 6)  # frames with closed eyes, the last excluded
CHANGE = 4  # the first frame of the new mood


@dataclass(frozen=True)
class Clip:
    """A person, what happens, and the mood afterwards (the same but for ``becomes``)."""

    look: Look
    motion: str
    mood: str

    @property
    def words(self) -> str:
        """What happens, as captions say it."""
        return f"becomes {self.mood}" if self.motion == "becomes" else self.motion

    def frames(self, rest: Pose) -> list[tuple[Look, Pose, str]]:
        """Look, pose and eyes of each frame; ``rest`` is the pose that the motion starts from."""
        return [self._frame(i, rest) for i in range(FRAMES)]

    def _frame(self, index: int, rest: Pose) -> tuple[Look, Pose, str]:
        share = index / (FRAMES - 1)
        eased = share * share * (3 - 2 * share)
        look, pose, eyes = self.look, rest, MOODS[self.look.mood][0]
        if self.motion in MOVES:
            field, first, last = MOVES[self.motion]
            pose = replace(rest, **{field: round(first + (last - first) * eased, 2)})
        elif self.motion == "blinks" and BLINK[0] <= index < BLINK[1]:
            eyes = "humble"
        elif self.motion == "becomes" and index >= CHANGE:
            look, eyes = replace(look, mood=self.mood), MOODS[self.mood][0]
        return look, pose, eyes

    def caption(self, rng: np.random.Generator) -> str:
        """A picture's caption and what happens."""
        return f"{say(self.look, rng).caption} , {self.words}"


def clips(seed: int, *, held_out: bool) -> Iterator[Clip]:
    """An endless stream of clips, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        look, motion = sample_look(rng, held_out=held_out), MOTIONS[rng.integers(len(MOTIONS))]
        if motion == "blinks" and look.mood not in OPEN_EYES:
            continue
        others = [mood for mood in MOODS if mood != look.mood]
        mood = others[rng.integers(len(others))] if motion == "becomes" else look.mood
        if is_held_out(replace(look, mood=mood)) == held_out:
            yield Clip(look, motion, mood)
