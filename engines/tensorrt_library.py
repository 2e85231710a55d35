"""TensorRT and TensorRT for RTX as Python modules: which there are, what they are called, what they say.

Both offer the same API, so that all that follows takes the module as a parameter. Importing this file loads neither.
"""

import collections
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cachec.runtime.errors import EngineError, InputError, MissingExtraError, missing_extra

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

LEAN = "tensorrt_lean"
NO_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "failed_allocation", "bad_alloc", "cannot allocate")


@dataclass(frozen=True)
class Library:
    """One of the two.

    ``modules``: names that it is imported by, the first that is installed is taken. ``extra`` brings it. ``major``: the major
    version that the code is written for. ``driver``: the CUDA version that the GPU's driver must be for at least. ``gpus``:
    compute capabilities that engines are built for without a GPU; else they are built for the one that is there.
    ``keeps_timings``: does its builder measure kernels? ``flags``: of its builder, which the other does not have.
    """

    name: str
    modules: tuple[str, ...]
    extra: str
    major: int
    driver: tuple[int, int]
    gpus: tuple[int, ...] = ()
    keeps_timings: bool = True
    flags: tuple[str, ...] = ()

    def module_name(self) -> str | None:
        """Name of the module that is installed, if one is."""
        return next((name for name in self.modules if importlib.util.find_spec(name) is not None), None)

    def load(self) -> ModuleType:
        """The module.

        Raises:
            MissingExtraError: it is not installed, or its shared libraries do not load; with the reason.
            InputError: it is of another major version.
        """
        found = self.module_name()
        if found is None:
            raise missing_extra(self.modules[0], self.extra, f"the {self.name} backend")
        try:
            module = importlib.import_module(found)
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingExtraError(
                f"{found} is installed but cannot be loaded: {error}. The {self.name} backend needs its shared libraries and a "
                f"GPU driver: pip install 'cachec[{self.extra}]'"
            ) from error
        if (major := int(module.__version__.split(".")[0])) != self.major:
            raise InputError(
                f"{found} is version {module.__version__}, but the {self.name} backend is written for {self.major}: "
                f"pip install 'cachec[{self.extra}]' in place of version {major}"
            )
        return module

    def can_build(self) -> bool:
        """Has the module a builder and a parser? NVIDIA's lean one only runs engines."""
        return self.module_name() != LEAN

    def check_builder(self) -> None:
        """Raise ``InputError`` unless engines can be built with the module."""
        self.load()
        if not self.can_build():
            raise InputError(f"{LEAN} runs engines, but has no builder: pip install 'cachec[{self.extra}]'")

    def version(self) -> str:
        """The version of the installed module."""
        return str(self.load().__version__)


TENSORRT = Library("tensorrt", ("tensorrt", LEAN), "tensorrt", major=11, driver=(13, 1))
TENSORRT_RTX = Library(
    "tensorrt-rtx",
    ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "rtx",
    major=1,
    driver=(13, 0),
    gpus=(80, 86, 89, 120),
    keeps_timings=False,
    flags=("REQUIRE_USER_ALLOCATION",),  # else calls may allocate, which a CUDA graph cannot hold
)


class Reports:
    """What the library says. Its errors are kept for our own; the rest goes to Python's log."""

    def __init__(self, library: ModuleType) -> None:
        errors: collections.deque[str] = collections.deque(maxlen=8)

        class Messages(library.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
                if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                    errors.append(" ".join(msg.split()))
                log.log(logging.INFO if severity == library.ILogger.WARNING else logging.DEBUG, "%s", msg)

        self._errors = errors
        self.logger: trt.ILogger = Messages()

    def clear(self) -> None:
        """Forget what it said until now: what comes next begins."""
        self._errors.clear()

    @contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Turn what pybind makes of a null pointer, and of errors of C++, into an ``EngineError`` about ``what``."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            raise self.error(what) from error

    def error(self, what: str) -> EngineError:
        """An error about ``what``, with all that the library said about it."""
        said = "; ".join(dict.fromkeys(self._errors)) or "the library does not say why"
        self._errors.clear()
        if any(words in said.lower() for words in NO_MEMORY):
            return EngineError(
                f"there is no memory to {what}: {said}. Stop what else uses the GPU, or take a smaller size or batch; for a "
                "build, a workspace limits what kernels may take"
            )
        return EngineError(f"cannot {what}: {said}")


@functools.cache
def reports_of(library: ModuleType) -> Reports:
    """The one logger of a library: it wants the same one for everything."""
    return Reports(library)


def dtypes_of(library: ModuleType) -> dict[Any, str]:
    """Names of the element types that cross an engine's border."""
    return {
        library.DataType.FLOAT: "float32",
        library.DataType.HALF: "float16",
        library.DataType.BF16: "bfloat16",
        library.DataType.INT64: "int64",
        library.DataType.INT32: "int32",
        library.DataType.BOOL: "bool",
    }
