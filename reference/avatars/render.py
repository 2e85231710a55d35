"""Pictures of looks: specs go to Node, RGB bytes come back (``render.mjs``). Only making the dataset needs Node."""

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachec.runtime.errors import MissingExtraError
from reference.avatars.attributes import Look

HERE = Path(__file__).parent
LOCK = "package-lock.json"
VIEW = (64, 72, 640)  # the square of the style's 768 x 768 drawing that is shown: x, y, side
SIDE = 128


@dataclass(frozen=True)
class Pose:
    """Where a figure stands, in units of the drawing, five to a pixel at 128.

    Shift, scale, the head's tilt in degrees, and the shift of the face on it, which looks like a turn.
    """

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    tilt: float = 0.0
    turn: float = 0.0


def random_pose(rng: np.random.Generator) -> Pose:
    """Slightly anywhere: what no caption states and the generator's noise decides."""
    return Pose(
        dx=round(rng.uniform(-18, 18), 1),
        dy=round(rng.uniform(-10, 14), 1),
        scale=round(rng.uniform(0.95, 1.05), 3),
        tilt=round(rng.uniform(-5, 5), 1),
        turn=round(rng.uniform(-8, 8), 1),
    )


def spec_line(look: Look, pose: Pose, *, eyes: str | None = None) -> str:
    """One line of ``render.mjs``'s input; ``eyes`` replaces the mood's own (the renderer's word)."""
    options = look.options() | ({"eyes": [eyes]} if eyes else {})
    figure = [pose.dx, pose.dy, pose.scale]
    return json.dumps({"options": options, "view": VIEW, "figure": figure, "tilt": pose.tilt, "turn": pose.turn})


def install(folder: Path) -> Path:
    """The renderer in ``folder``, with the pinned packages installed by ``npm ci`` (once for each lock file).

    Raises:
        MissingExtraError: Node or npm is absent.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise MissingExtraError(
            "the avatars are drawn by Node: install node and npm (version 20 or later), then run this again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    finished, lock = folder / "node_modules" / f".{LOCK}", folder / LOCK  # npm writes the first at its end
    installed = finished.exists() and lock.exists() and lock.read_bytes() == (HERE / LOCK).read_bytes()
    if not installed:
        finished.unlink(missing_ok=True)
    for name in ("package.json", LOCK, "render.mjs"):
        shutil.copyfile(HERE / name, folder / name)
    if not installed:
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
    return (folder / "render.mjs").resolve()


def render(lines: Iterable[str], to: Path, *, script: Path, side: int = SIDE) -> None:
    """Draw one picture per spec line and append them to ``to``: ``side * side * 3`` bytes of RGB each."""
    subprocess.run(
        ["node", str(script), str(to.resolve()), str(side)],
        input="\n".join(lines) + "\n",
        text=True,
        cwd=script.parent,
        check=True,
    )


def open_pictures(path: Path, *, num: int, side: int = SIDE) -> NDArray[np.uint8]:
    """The first ``num`` pictures of ``path``, [num, side, side, 3], mapped and read-only."""
    return np.memmap(path, np.uint8, "r", shape=(num, side, side, 3))
