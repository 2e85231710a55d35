"""What every back end offers: an engine to share, and contexts to run it in.

The names below are the ones that compute and forecast graphs use for what is not the model's own input.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array, Signature

VELOCITY = "velocity"  # the model's output [B, …]
FEATURE = "feature"  # the hidden state at the cut [B, …]
FEATURES = "features"  # the written slots [H, B, …]
COEFFICIENTS = "coefficients"  # one row [H]
BIAS = "bias"  # scalar
SIGMAS = "sigmas"  # the whole schedule [T + 1]
STEP = "step"  # scalar int64
HISTORY_STEPS = "history_steps"  # which steps the history is of, newest first [W] int64


def history_name(index: int) -> str:
    """Input name of the ``index``-th newest feature of an unfolded forecast engine."""
    return f"feature_{index}"


class ExecutionContext(ABC):
    """Runs one engine for one session. Keeps nothing between calls and writes only into the given buffers."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Run once. Every array is C-contiguous and of the engine's dtype; ``outputs`` may name a subset.

        Raises:
            InputError: a name is unknown or missing, or a shape or dtype does not fit.
        """


class Engine(ABC):
    """An immutable compiled graph, shared by all sessions. A context manager."""

    name: ClassVar[str]
    needs_same_version: ClassVar[bool]  # artifacts load only in the version of the library that built them
    signature: Signature

    @staticmethod
    @abstractmethod
    def version() -> str:
        """Version of the library behind it, recorded in bundles."""

    @staticmethod
    @abstractmethod
    def build(programs: Mapping[str, Any], signatures: Mapping[str, Signature], out: Path) -> dict[str, Path]:
        """Build engines from exported programs (``torch.export.ExportedProgram``) into the directory ``out``.

        Returns the file of each program. Other files in ``out`` (shared weights) belong to the engines, too.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path, signature: Signature, *, threads: int | None = None) -> Self:
        """Load the artifact at ``path``; ``threads`` limits the CPU threads of one call.

        Raises:
            BundleError: the file is not an engine of this back end.
        """

    @abstractmethod
    def context(self) -> ExecutionContext:
        """A new context for one session."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine: no new contexts; its memory is freed with the last context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_bindings(signature: Signature, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Raise ``InputError`` unless the names, shapes and dtypes fit ``signature``; symbolic sizes must agree."""
    wanted = {spec.name for spec in signature.inputs}
    if set(inputs) != wanted:
        raise InputError(f"engine inputs are {sorted(wanted)}, got {sorted(inputs)}")
    sizes: dict[str, int] = {}
    known = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    for name, array in (*inputs.items(), *outputs.items()):
        if name not in known:
            raise InputError(f"engine has no tensor {name!r}; it has {sorted(known)}")
        spec = known[name]
        if array.dtype != spec.dtype or len(array.shape) != len(spec.shape):
            raise InputError(f"{name!r} is {array.dtype}{list(array.shape)}, expected {spec.dtype}{list(spec.shape)}")
        for want, got in zip(spec.shape, array.shape, strict=True):
            if got != (sizes.setdefault(want, got) if isinstance(want, str) else want):
                raise InputError(f"{name!r} has shape {list(array.shape)}, expected {list(spec.shape)} with {sizes}")
        if not array.flags.c_contiguous:
            raise InputError(f"{name!r} is not contiguous; pass numpy.ascontiguousarray of it")
