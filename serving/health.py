"""Whether a bundle's engines still work, by what becomes of its requests: a GPU that is gone fails every one of them."""

import logging

from cachec.runtime.errors import EngineError, NotFiniteError

log = logging.getLogger(__name__)
IN_A_ROW = 3  # failed requests; of fewer each may have been the reason itself, as one that takes too much memory


class Health:
    """Of the bundle ``name``. ``failure``: what engines say, once ``IN_A_ROW`` requests failed with none made between."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0
        self.failure: EngineError | None = None

    def note(self, error: Exception | None) -> None:
        """A request was made, or failed with this error. Only engines' own count, and no NaN: what is asked for may make it."""
        if error is None:
            if self.failure is not None:
                log.warning("the engines of %s work again, after %d failed requests", self._name, self._count)
            self._count, self.failure = 0, None
        elif isinstance(error, EngineError) and not isinstance(error, NotFiniteError):
            self._count += 1
            if self._count == IN_A_ROW:
                log.error(
                    "the engines of %s failed %d requests in a row, the last one so: %s. /health says broken until they make "
                    "one again: see whether their device is still there, and start the server again",
                    self._name,
                    self._count,
                    error,
                )
            if self._count >= IN_A_ROW:
                self.failure = error
