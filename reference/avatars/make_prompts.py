"""Write the prompt lists of avatars and clips: ``python -m reference.avatars.make_prompts``. No two lists share a caption.

Those to evaluate with are captions of combinations that no model was trained on; all others are of training combinations.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reference.avatars.attributes import looks, say
from reference.avatars.motion import clips

OUT = Path(__file__).parents[2] / "compiler" / "calibration" / "prompts"
LISTS = (("train", 128, 1101), ("choose", 128, 1404), ("measure", 64, 1303), ("eval", 128, 1202))  # use, captions, seed


def picture_captions(seed: int, *, held_out: bool) -> Iterator[str]:
    """An endless stream of captions of pictures."""
    rng = np.random.default_rng(seed + 100)
    for look in looks(seed, held_out=held_out):
        yield say(look, rng).caption


def clip_captions(seed: int, *, held_out: bool) -> Iterator[str]:
    """An endless stream of captions of clips."""
    rng = np.random.default_rng(seed + 100)
    for clip in clips(seed, held_out=held_out):
        yield clip.caption(rng)


STREAMS = {"avatars": picture_captions, "clips": clip_captions}  # by the lists' name


def make_lists(name: str) -> dict[str, list[str]]:
    """Captions of one stream, by use."""
    lists: dict[str, list[str]] = {}
    taken: set[str] = set()
    for use, num, seed in LISTS:
        lists[use] = []
        for caption in STREAMS[name](seed, held_out=use == "eval"):
            if caption not in taken:
                lists[use].append(caption)
                taken.add(caption)
            if len(lists[use]) == num:
                break
    return lists


def main() -> None:
    for name in STREAMS:
        for use, captions in make_lists(name).items():
            (OUT / f"{name}-{use}.txt").write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
