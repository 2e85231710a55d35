"""Which values the symbolic sizes of a bundle's engines take."""

import math

from cachec.runtime.abi import BATCH, COMPUTE, EXPERT, FORECAST, FORECASTS, MAX_BATCH, SLOTS, steps_of
from cachec.runtime.build_options import SizeRange
from cachec.runtime.errors import InputError

USUAL_STRIDE = 6  # a step in so many is computed, where the schedule is not known when engines are built


def size_ranges(
    steps: int, computed: int, *, batch: int | None = None, max_batch: int = 1, guided: bool = False
) -> dict[str, SizeRange]:
    """Ranges of all symbolic sizes, for any schedule over ``steps`` steps; tuned for ``computed`` evenly spread ones.

    ``batch``: exactly so many samples a request. ``max_batch``: up to so many. ``guided``: the model runs on two rows for each.
    """
    least, most = (1, max_batch) if batch is None else (batch, batch)
    rows = 2 * most if guided else most
    computed = min(max(computed, 1), steps)
    forecast = max(steps - computed, 1)
    several = max(steps - 1, 1)
    return {
        BATCH: SizeRange(least, rows, rows),
        SLOTS: SizeRange(1, computed, steps),
        FORECASTS: SizeRange(1, min(math.ceil(forecast / computed), several), several),
        steps_of(COMPUTE): SizeRange(1, computed, steps),
        steps_of(EXPERT): SizeRange(1, computed, steps),
        steps_of(FORECAST): SizeRange(1, forecast, steps),
    }


def check_max_batch(batch: int) -> None:
    """Raise ``InputError`` unless engines can be built for so many samples a call."""
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"max-batch is {batch}; it must be from 1 to {MAX_BATCH}")
