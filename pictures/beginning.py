"""Requests that begin with a picture: at which step, and what noise makes of its latents there.

``B`` samples, ``T`` steps, ``H`` and ``W`` pixels.
"""

from dataclasses import dataclass

import numpy as np

from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array
from cachec.runtime.variants import PictureSize

STRENGTH = 0.6  # how far a picture is changed where nobody says, as in diffusers


@dataclass(frozen=True, eq=False)
class Beginning:
    """The step ``start``, and the ``latents`` [B, …] of pictures; without them noise alone, at the first step."""

    start: int = 0
    latents: Array | None = None

    def mixed(self, noise: Array, sigmas: Array) -> Array:
        """What a request begins with [B, …], for its noise [B, …] and noise levels [T + 1]."""
        if self.latents is None:
            return noise
        sigma = np.float32(sigmas[self.start])
        made: Array = (1 - sigma) * self.latents + sigma * noise
        return made


def start_of(strength: float | None, steps: int) -> int:
    """The step at which a request of this strength begins, as diffusers counts: ``strength`` is the part that is left.

    Raises:
        InputError: nothing would be left to do, or more than all.
    """
    strength = STRENGTH if strength is None else strength
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength:g}; it must be above 0, which leaves the picture as it is, and at most 1")
    return int(steps - steps * strength)


def check_pictures(pictures: Array, size: str, count: int) -> None:
    """Raise ``InputError`` unless there are ``count`` pictures [B, H, W, 3] of this size, uint8."""
    shape = PictureSize.parse(size)
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (shape.height, shape.width, 3):
        raise InputError(f"pictures are {pictures.dtype}{list(pictures.shape)}; of {size} they are uint8[B, {shape.height}, "
                         f"{shape.width}, 3]: bring them to this size, or ask for another")  # fmt: skip
    if len(pictures) != count:
        raise InputError(f"there are {len(pictures)} pictures for {count} prompts: give one for each")
