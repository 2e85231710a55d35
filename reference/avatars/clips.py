"""The clips that tiny-hunyuan learns: ``python -m reference.avatars.clips --out build/reference``.

Writes ``clips.rgb`` (uint8, [N, 9, 96, 96, 3]) with ``clips.jsonl`` beside it, and the same for ``held-out-clips``. Resumable.
"""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from reference.avatars.attributes import Look
from reference.avatars.dataset import draw, read
from reference.avatars.motion import CLIP_SIDE, FRAMES, Clip, clips
from reference.avatars.render import Pose, spec_line

SEEDS = {"clips": 21, "held-out-clips": 22}


def rest(rng: np.random.Generator) -> Pose:
    """Where a clip starts, but for what its motion says."""
    return Pose(dx=round(rng.uniform(-10, 10), 1), dy=round(rng.uniform(-6, 8), 1), scale=round(rng.uniform(0.96, 1.04), 3))


def write(name: str, num: int, out: Path) -> None:
    """Descriptions and frames of the first ``num`` clips."""
    rng, described, specs = np.random.default_rng(SEEDS[name] + 100), [], []
    for clip in islice(clips(SEEDS[name], held_out=name != "clips"), num):
        described.append(json.dumps({"clip": asdict(clip), "caption": clip.caption(rng)}))
        specs += [spec_line(look, pose, eyes=eyes) for look, pose, eyes in clip.frames(rest(rng))]
    draw(name, described, specs, out, side=CLIP_SIDE)


def load(name: str, out: Path) -> tuple[NDArray[np.uint8], list[Clip], list[str]]:
    """Frames [N, 9, 96, 96, 3], what they show, and one caption for each."""
    frames, described = read(name, out, side=CLIP_SIDE, frames=FRAMES)
    shown = [Clip(Look(**each["clip"]["look"]), each["clip"]["motion"], each["clip"]["mood"]) for each in described]
    return frames.reshape(-1, FRAMES, *frames.shape[1:]), shown, [str(each["caption"]) for each in described]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True)
@click.option("--clips", "num", default=8_000, show_default=True)
@click.option("--held-out", default=600, show_default=True)
def main(out: Path, num: int, held_out: int) -> None:
    """Render training and held-out clips."""
    out.mkdir(parents=True, exist_ok=True)
    write("held-out-clips", held_out, out)
    write("clips", num, out)


if __name__ == "__main__":
    main()
