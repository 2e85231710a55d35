"""The pictures that the reference models learn: ``python -m reference.avatars.dataset --out build/reference``.

Writes ``pictures.rgb`` (uint8, [N, 128, 128, 3]) with ``pictures.jsonl`` beside it (look, caption, stated attributes), and the
same for ``held-out``. Resumable: what is there is kept, and a run goes on after the last whole picture.
"""

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from reference.avatars.attributes import Look, Saying, looks, say
from reference.avatars.render import SIDE, install, open_pictures, random_pose, render, spec_line

CHUNK = 500
SEEDS = {"pictures": 11, "held-out": 12}


@dataclass(frozen=True)
class Sample:
    """One picture's description and its line for the renderer."""

    look: Look
    saying: Saying
    spec: str

    def line(self) -> str:
        return json.dumps({"look": asdict(self.look), "caption": self.saying.caption, "stated": self.saying.stated})


def make_samples(name: str, num: int) -> list[Sample]:
    """The first ``num`` samples of ``pictures`` or ``held-out``; the same for the same arguments."""
    stream, rng = looks(SEEDS[name], held_out=name == "held-out"), np.random.default_rng(SEEDS[name] + 100)
    return [Sample(look, say(look, rng), spec_line(look, random_pose(rng))) for look in islice(stream, num)]


def draw(name: str, described: list[str], specs: list[str], out: Path, *, side: int = SIDE) -> None:
    """Write the descriptions, and render what is missing of the pictures."""
    path, size = out / f"{name}.rgb", side * side * 3
    (out / f"{name}.jsonl").write_text("".join(line + "\n" for line in described))
    script = install(out / "node")
    done = path.stat().st_size // size if path.exists() else 0
    if done:
        with path.open("r+b") as file:
            file.truncate(done * size)
    for start in tqdm(range(done, len(specs), CHUNK), desc=name, mininterval=5):
        render(specs[start : start + CHUNK], path, script=script, side=side)


def write(name: str, num: int, out: Path) -> None:
    """``pictures`` or ``held-out``: descriptions and pictures."""
    samples = make_samples(name, num)
    draw(name, [sample.line() for sample in samples], [sample.spec for sample in samples], out)


def read(name: str, out: Path, *, side: int = SIDE, frames: int = 1) -> tuple[NDArray[np.uint8], list[dict]]:
    """Pictures [N, side, side, 3] and their descriptions, as far as both are there; one for every ``frames`` pictures."""
    path = out / f"{name}.rgb"
    num = path.stat().st_size // (side * side * 3 * frames)
    lines = (out / f"{name}.jsonl").read_text().splitlines()[:num]
    return open_pictures(path, num=len(lines) * frames, side=side), [json.loads(line) for line in lines]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/reference"), show_default=True)
@click.option("--pictures", default=40_960, show_default=True)
@click.option("--held-out", default=2_000, show_default=True)
def main(out: Path, pictures: int, held_out: int) -> None:
    """Render training and held-out pictures."""
    out.mkdir(parents=True, exist_ok=True)
    write("held-out", held_out, out)
    write("pictures", pictures, out)


if __name__ == "__main__":
    main()
