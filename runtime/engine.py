"""The run face of every back end: an engine to share, contexts to run it in, and calls that are bound to their buffers.

The build face is in ``runtime/builder.py``; the names of graphs and tensors are in ``runtime/abi.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from cachec.runtime.device import CPU, Buffer, Device, DeviceName
from cachec.runtime.errors import BundleError, InputError, cannot_be_pickled, shortened
from cachec.runtime.specs import Array, Signature

HOST = DeviceName(CPU)
ONNX, CONSTANTS = "onnx", "constants"  # forms of other weights: an ONNX file; JSON that says where a program's constants lie


@dataclass(frozen=True)
class LoadOptions:
    """How engines are loaded.

    ``threads`` limits the CPU threads of one call. ``weights``: files, by engine, whose weights go into engines that were built
    without, or in place of those that they were built with. ``needs``: what the engines were built to need.
    """

    device: DeviceName = HOST
    threads: int | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


ON_HOST = LoadOptions()


class Call(ABC):
    """An engine call with its buffers bound. Making it again reads and writes the same buffers, and allocates none."""

    @abstractmethod
    def run(self) -> None:
        """Make the call. On devices that work beside the host it may still be pending on return."""


class ExecutionContext(ABC):
    """Runs one engine for one session. Keeps nothing between calls and writes only into the given buffers.

    ``scratch``: memory of its device that calls may use beside their buffers. Contexts that share it must not run at the same
    time. It is given before calls are bound that need it.
    """

    scratch: Buffer | None = None

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How much scratch memory a call takes whose inputs have these shapes."""
        return 0

    @abstractmethod
    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """A call on these buffers. ``outputs`` may name a subset; no output may lie where an input does.

        Raises:
            InputError: a name is unknown or missing, a shape, dtype or layout does not fit, or there is too little scratch
                memory.
        """

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run once."""
        self.bind(inputs, outputs).run()


class Engine(ABC):
    """An immutable compiled graph, shared by all sessions. A context manager.

    ``tables``: inputs that are the same in all calls (see :meth:`at`).
    """

    name: ClassVar[str]
    needs_same_version: ClassVar[bool]  # artifacts load only in the version of the library that built them
    only_device: ClassVar[str | None] = None  # the one kind of device that it runs on

    def __init__(self, native: Any, signature: Signature, device: Device) -> None:
        self._native: Any = native  # the library's own object
        self.signature = signature
        self.device = device
        self.tables: Mapping[str, Array] = {}

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Version of the library behind it, recorded in bundles."""

    @classmethod
    @abstractmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        """Raise ``InputError`` unless graphs of ``precision`` can run on ``device`` here; says what was looked for."""

    @classmethod
    def check_needs(cls, needs: Mapping[str, Any], device: DeviceName) -> None:
        """Raise ``BundleError`` unless this machine has what engines were built to need."""

    @classmethod
    def is_made_for(cls, needs: Mapping[str, Any], device: DeviceName) -> bool:
        """Were engines that run here also built for just this device?"""
        return True

    @classmethod
    def rows_are_exact(cls, device: DeviceName) -> bool:
        """Does a row get the same bits in batches of every size? If not, the same to rounding."""
        return False

    @classmethod
    def weights_form(cls, needs: Mapping[str, Any]) -> str | None:
        """In what form engines that were built to have these needs take other weights; ``None``: they do not."""
        return None

    @classmethod
    @abstractmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], options: LoadOptions = ON_HOST
    ) -> dict[str, Self]:
        """Load all engines of a bundle, by name.

        Raises:
            BundleError: a file is not an engine of this back end.
            InputError: there is no such device here, or no room on it.
        """

    def at(self, signature: Signature, tables: Mapping[str, Array]) -> Self:
        """The same engine for one of several sizes: ``signature`` has its shapes, and ``tables`` what it reads there."""
        one = object.__new__(type(self))
        vars(one).update(vars(self))
        one.signature = signature
        one.tables = {spec.name: tables[spec.name] for spec in signature.inputs if spec.name in tables}
        return one

    def context(self, device: Device | None = None) -> ExecutionContext:
        """A new context for one session, whose buffers are of ``device``: the engine's own, or one made from it for a session.

        Raises:
            BundleError: the engine was closed.
        """
        if self._native is None:
            raise BundleError("the engine was closed: load the bundle again")
        return self._context(self._native, device or self.device)

    @abstractmethod
    def _context(self, native: Any, device: Device) -> ExecutionContext:
        """A new context on the library's own object."""

    def __reduce__(self) -> str:
        raise cannot_be_pickled("an engine", "load the bundle in the other process")

    def close(self) -> None:
        """Let go of the engine: no new contexts; its memory is freed with the last context."""
        self._native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_bindings(signature: Signature, device: Device, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
    """Raise ``InputError`` unless names, shapes and dtypes fit ``signature``; symbolic sizes must agree.

    All buffers must be of ``device``.
    """
    wanted = {spec.name for spec in signature.inputs}
    if set(inputs) != wanted:
        raise InputError(f"engine inputs are {sorted(wanted)}, got {sorted(inputs)}")
    sizes: dict[str, int] = {}
    known = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    for name, buffer in (*inputs.items(), *outputs.items()):
        if name not in known:
            raise InputError(f"engine has no tensor {shortened(name)}; it has {shortened(sorted(known), 300)}")
        if not device.owns(buffer):
            raise InputError(f"{name!r} is a {type(buffer).__name__}, which is no buffer of {device.name}: upload it first")
        spec, dtype = known[name], str(buffer.dtype).removeprefix("torch.")
        if dtype != spec.dtype or len(buffer.shape) != len(spec.shape):
            raise InputError(f"{name!r} is {dtype}{list(buffer.shape)}, expected {spec.dtype}{shortened(list(spec.shape))}")
        for want, got in zip(spec.shape, buffer.shape, strict=True):
            if got != (sizes.setdefault(want, got) if isinstance(want, str) else want):
                raise InputError(
                    f"{name!r} has shape {list(buffer.shape)}, expected {shortened(list(spec.shape))} with {shortened(sizes)}"
                )
        if not _is_contiguous(buffer):
            raise InputError(f"{name!r} is not contiguous; pass numpy.ascontiguousarray of it")


def _is_contiguous(buffer: Buffer) -> bool:
    flags = getattr(buffer, "flags", None)
    return bool(buffer.is_contiguous() if flags is None else flags.c_contiguous)
