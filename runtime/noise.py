"""The noise that a seed stands for: the same on every back end, with and without torch."""

import numpy as np

from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

GENERATOR = "numpy.PCG64.standard_normal"
NUM_SEEDS = 2**32  # seeds that people give; as many behind them are for training, so the two never meet


def make_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 noise for one sample; ``shape`` is without the batch axis.

    Sample ``i`` of a batch is made from its own seed, so a picture does not depend on what else is in the batch.
    """
    if not 0 <= seed < 2 * NUM_SEEDS:
        raise InputError(f"seed is {seed}; it must lie between 0 and {2 * NUM_SEEDS - 1}")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def check_seed(seed: int) -> None:
    """Raise ``InputError`` unless ``seed`` is one that a person may give."""
    if not 0 <= seed < NUM_SEEDS:
        raise InputError(f"seed is {seed}; it must not be negative, and below {NUM_SEEDS}")
