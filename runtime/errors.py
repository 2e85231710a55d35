"""What can go wrong, one class per kind; each carries the exit code of the command line.

A message says what is wrong, with which value, and what to do.
"""

import difflib
import importlib.util
import math
from collections.abc import Iterable
from typing import ClassVar


class CachecError(Exception):
    """Base of every error that ``cachec`` raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(CachecError):
    """An argument cannot be used: unknown name, impossible schedule, wrong shape."""

    exit_code: ClassVar[int] = 3


class MissingExtraError(CachecError):
    """A package that this command needs is not installed."""

    exit_code: ClassVar[int] = 4


class ModelUnavailableError(CachecError):
    """The model's weights cannot be reached."""

    exit_code: ClassVar[int] = 5


class BundleError(CachecError):
    """A bundle is damaged, unsafe, from a newer version, or does not fit this machine."""

    exit_code: ClassVar[int] = 6


class OutputError(CachecError):
    """The result cannot be written: it exists already, or the place is not writable."""

    exit_code: ClassVar[int] = 7


class PredictorError(CachecError):
    """A trained predictor does not fit what it is asked to do, or cannot be folded."""

    exit_code: ClassVar[int] = 8


class PassError(CachecError):
    """A graph pass met a graph that it cannot handle, or broke its own contract."""

    exit_code: ClassVar[int] = 9


class EngineError(CachecError):
    """A back end cannot build or run an engine: a compiler is missing, memory is short."""

    exit_code: ClassVar[int] = 11


class NotFiniteError(EngineError):
    """What an engine made holds NaN or infinity: it works, and what it was given is too much for its type."""


class QualityError(CachecError):
    """A quality or speed that was asked for is not reached."""

    exit_code: ClassVar[int] = 10


class DeadlineError(CachecError):
    """A request cannot be done in time; ``seconds``: what it would take."""

    exit_code: ClassVar[int] = 12

    def __init__(self, message: str, seconds: float = math.inf) -> None:
        super().__init__(message)
        self.seconds = seconds


def shortened(value: object, limit: int = 80) -> str:
    """``value`` as ``repr`` writes it, for a message: at most ``limit`` characters, and then how many there are."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def in_one_line(value: object, limit: int = 200) -> str:
    """What an error or a path says, for a message: one line of at most ``limit`` characters; its kind if it says nothing."""
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a name that is not among ``known``, with the nearest one suggested."""
    known = sorted({*known})
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f" Did you mean {shortened(close[0])}?" if close else ""
    return InputError(f"unknown {kind} {shortened(name)}.{hint} Known: {in_one_line(', '.join(known), 400)}.")


def cannot_be_pickled(what: str, instead: str) -> InputError:
    """An error for what lives in this process only: memory of a device, objects of a library."""
    return InputError(f"{what} cannot be pickled or copied, it belongs to this process: {instead}")


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """An error that names the extra which brings ``package``."""
    return MissingExtraError(f"{purpose} needs {package!r}, which is not installed: pip install 'cachec[{extra}]'")


def need(*packages: str, extra: str, purpose: str) -> None:
    """Raise ``MissingExtraError`` unless all ``packages`` are installed; they are not imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, extra, purpose)
