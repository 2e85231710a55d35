"""The stages of a compilation, and what each takes."""

import logging
import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

STAGES = ("check", "trained predictor", "graphs", "engine plans", "build engines")
OF_A_PART = ("calibration", "schedules and coefficients", "measure")  # for every size with every number of steps


class Clock:
    """Seconds by stage, with a progress bar over the stages on a terminal; a context manager. A stage may come again."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self._stages, self._done = stages, 0
        self._bar = tqdm(total=len(stages), unit="stage", desc=stages[0], disable=None, leave=False)
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def lap(self) -> None:
        """The current stage is done."""
        now = time.perf_counter()
        stage, spent = self._stages[self._done], now - self._last
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        self._last = now
        self._done += 1
        log.info("%s: %.1f s", stage, spent)
        self._bar.update()
        if self._done < len(self._stages):
            self._bar.set_description(self._stages[self._done])
            log.info("%s …", self._stages[self._done])
