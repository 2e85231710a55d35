"""The noise that a seed stands for: the same on every back end, with and without torch."""

import numpy as np

from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

GENERATOR = "numpy.PCG64.standard_normal"


def make_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 noise for one sample; ``shape`` is without the batch axis.

    Sample ``i`` of a batch is made from its own seed, so a picture does not depend on what else is in the batch.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}; it must not be negative")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)
