"""Pictures on disk, and the sheet that ``cachec run --compare`` writes."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachec.pictures.files import png_of
from cachec.runtime.errors import missing_extra
from cachec.runtime.files import write_file
from cachec.runtime.specs import Array

if importlib.util.find_spec("PIL") is None:
    raise missing_extra("pillow", "compile", "drawing pictures")
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 256  # pixels; smaller pictures are enlarged by a whole factor
MIN_FRAME, MAX_FRAMES = 96, 9  # the same of a video's frames, and how many of them are shown beside each other
MARGIN = 16
FONT_SIZE = 15
INK, FAINT, PAPER = (28, 28, 30), (110, 110, 116), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """A picture [H, W, 3], or a video of which some frames are shown in a row, in [0, 1], with the lines under it."""

    picture: Array
    lines: tuple[str, ...]


def to_image(picture: Array) -> Image.Image:
    """An 8-bit image from floats in [0, 1]; of a video the frame in the middle."""
    still = picture[len(picture) // 2] if picture.ndim == 4 else picture
    return Image.fromarray((np.clip(still, 0, 1) * 255).round().astype(np.uint8))


def to_strip(picture: Array) -> Image.Image:
    """The same; of a video some frames beside each other."""
    return to_image(np.concatenate(some_frames(picture), axis=1))


def some_frames(picture: Array) -> list[Array]:
    """A picture alone; of a video evenly spaced frames, the first and the last among them."""
    if picture.ndim == 3:
        return [picture]
    return list(picture[np.linspace(0, len(picture) - 1, min(len(picture), MAX_FRAMES)).round().astype(int)])


def write_png(image: Image.Image, path: Path, more: Sequence[Image.Image] = ()) -> None:
    """Write atomically; with ``more`` frames behind the first as an animated PNG.

    Raises:
        OutputError: the place cannot be written.
    """
    write_file(path, png_of([image, *more]))


def write_picture(picture: Array, path: Path) -> None:
    """A picture [H, W, 3] as a PNG, a video [F, H, W, 3] as an animated one. Raises as :func:`write_png`."""
    frames = [to_image(frame) for frame in (picture if picture.ndim == 4 else [picture])]
    write_png(frames[0], path, frames[1:])


def draw_sheet(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Rows of cells, each row under its prompt; cells of videos stand under each other."""
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE - 2)
    video = rows[0][1][0].picture.ndim == 4
    first = to_strip(rows[0][1][0].picture)
    factor = max(1, -(-(MIN_FRAME if video else MIN_CELL) // first.height))
    width, height = first.width * factor, first.height * factor
    line = FONT_SIZE + 6
    lines = {id(cell): (", ".join(cell.lines),) if video else cell.lines for _, cells in rows for cell in cells}
    cell_height = height + max(map(len, lines.values())) * line + MARGIN
    most = max(len(cells) for _, cells in rows)
    columns, deep = (1, most) if video else (most, 1)
    row_height = line + deep * cell_height
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), MARGIN + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (prompt, cells) in enumerate(rows):
        top = MARGIN + r * row_height
        draw.text((MARGIN, top), _fit(prompt, draw, font, sheet.width - 2 * MARGIN), fill=INK, font=font)
        for c, cell in enumerate(cells):
            left, upper = MARGIN + c % columns * (width + MARGIN), top + line + c // columns * cell_height
            image = to_strip(cell.picture).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(image, (left, upper))
            for i, text in enumerate(lines[id(cell)]):
                place = (left, upper + height + 4 + i * line)
                draw.text(place, _fit(text, draw, small, width), fill=INK if i == 0 else FAINT, font=small)
    return sheet


def _fit(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
