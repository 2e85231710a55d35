"""The stages of a compilation, and what each takes."""

import logging
import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

STAGES = (
    "check",
    "trained predictor",
    "graphs",
    "engine plans",
    "build engines",
    "calibration",
    "schedules and coefficients",
    "measure",
)


class Clock:
    """Seconds by stage, with a progress bar over the stages on a terminal; a context manager."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self._stages = stages
        self._bar = tqdm(total=len(stages), unit="stage", desc=stages[0], disable=None, leave=False)
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def lap(self) -> None:
        """The current stage is done."""
        now = time.perf_counter()
        stage = self._stages[len(self.seconds)]
        self.seconds[stage] = now - self._last
        self._last = now
        log.info("%s: %.1f s", stage, self.seconds[stage])
        self._bar.update()
        if len(self.seconds) < len(self._stages):
            self._bar.set_description(self._stages[len(self.seconds)])
            log.info("%s …", self._stages[len(self.seconds)])
