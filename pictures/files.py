"""Pictures and videos as files, and pictures from files."""

import importlib.util
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from cachec.runtime.components import FRAMES_A_SECOND
from cachec.runtime.errors import EngineError, InputError, in_one_line, missing_extra
from cachec.runtime.specs import Array
from cachec.runtime.variants import PictureSize

if importlib.util.find_spec("PIL") is None:
    raise missing_extra("pillow", "pictures", "writing pictures")
from PIL import Image, ImageOps

READ = ("PNG", "JPEG", "WEBP")


def png_of(images: Sequence[Image.Image]) -> bytes:
    """A PNG file; of several images an animated one."""
    buffer, (first, *more) = io.BytesIO(), images
    animation: dict[str, Any] = {}
    if more:
        animation = {"save_all": True, "append_images": more, "duration": 1000 // FRAMES_A_SECOND, "loop": 0}
    first.save(buffer, format="PNG", **animation)
    return buffer.getvalue()


def to_png(picture: Array) -> bytes:
    """A picture [H, W, 3] as a PNG file, a video [F, H, W, 3] as an animated one; uint8."""
    return png_of([Image.fromarray(frame) for frame in (picture if picture.ndim == 4 else [picture])])


def to_mp4(video: Array, fps: float = FRAMES_A_SECOND) -> bytes:
    """A video [F, H, W, 3], uint8, as an MP4 file: H.264, of ``fps`` frames a second. An odd row or column is repeated.

    Raises:
        MissingExtraError: PyAV is not installed.
        EngineError: it cannot write H.264.
    """
    if importlib.util.find_spec("av") is None:
        raise missing_extra("av", "pictures", "writing mp4")
    import av

    odd = [(0, size % 2) for size in video.shape[1:3]]
    rate, even = Fraction(fps).limit_denominator(1000), np.pad(video, [(0, 0), *odd, (0, 0)], "edge")
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=rate, options={"crf": "18"})
            stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
            for frame in even:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            file.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        raise EngineError(f"PyAV {av.__version__} cannot write this video: {in_one_line(error)}") from error
    return buffer.getvalue()


def read_picture(content: bytes, sizes: Sequence[str]) -> Array:
    """A picture [H, W, 3], uint8, of a PNG, JPEG or WebP file, turned as the file says; nothing of it is transparent.

    Raises:
        InputError: it is no such file, or of none of the ``sizes``, ``64x64`` say; looked at before anything is unpacked.
    """
    known = [PictureSize.parse(size) for size in sizes]
    shapes = {(one.width, one.height) for one in known}
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=READ)
        if {image.size, image.size[::-1]} & shapes:
            image = ImageOps.exif_transpose(image)
        width, height = image.size
        array = np.asarray(image.convert("RGB")) if image.size in shapes else None
    except Exception as error:  # what is in a damaged file makes its reader raise anything
        raise InputError(f"the picture is no {', '.join(READ)} that can be read: {in_one_line(error)}") from error
    if array is None:
        raise InputError(f"the picture is {width}x{height}, and wanted is {', '.join(sizes)}: scale or crop it")
    return array
