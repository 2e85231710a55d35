"""Which target of a bundle runs here: the best that fits, and why the others do not."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cachec.engines.backends import get_engine
from cachec.runtime.bundle import ANY_DEVICE, Target
from cachec.runtime.device import CPU, CUDA, DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import BundleError, CachecError, in_one_line, unknown_name
from cachec.runtime.specs import BFLOAT16

log = logging.getLogger(__name__)

PREFERENCE = ("tensorrt", "torch-tensorrt", "tensorrt-rtx", "ort-tensorrt", "aoti", "ort", "inductor", "eager")  # on a GPU
PREFERENCE_ON_CPU = ("ort", "aoti", "inductor", "eager")  # as measured: bench/RESULTS.md


@dataclass(frozen=True)
class TargetName:
    """What a user calls a target: a back end, and the kind of device if it is to be bound to one: ``ort``, ``ort-cuda``."""

    backend: str
    device: str | None = None

    def __str__(self) -> str:
        return self.backend if self.device is None else f"{self.backend}-{self.device}"

    @classmethod
    def parse(cls, text: str, backends: Mapping[str, str]) -> "TargetName":
        """Read a name; ``backends`` are the known ones.

        Raises:
            InputError: it is none; with the nearest one.
        """
        if text in backends:
            return cls(text)
        backend, dash, device = text.rpartition("-")
        if dash and backend in backends and device in (CPU, CUDA):
            return cls(backend, device)
        raise unknown_name("target", text, backends)

    def matches(self, target: Target) -> bool:
        """Is this a name of ``target``?"""
        return self.backend == target.backend and (self.device in (None, target.device) or target.device == ANY_DEVICE)


ONNX_TARGET = TargetName("ort")  # the ONNX files as they are, from which others are built


@dataclass(frozen=True)
class Fit:
    """A target on a device of this machine: the class that runs it, or the reason why nothing does."""

    target: Target
    device: DeviceName
    backend: type[Engine] | None = None
    error: CachecError | None = None
    exact: bool = True  # built for just this device

    @property
    def fits(self) -> bool:
        return self.backend is not None

    @property
    def reason(self) -> str:
        """Why it does not fit."""
        return str(self.error or "")

    @property
    def in_words(self) -> str:
        """What a user wants to know."""
        if self.backend is None:
            return f"does not fit here: {self.reason}"
        tuned = "" if self.exact else ", but was not tuned for just this GPU: add-target makes one that is"
        return f"fits here, on {self.device}{tuned}"

    @property
    def batches_in_words(self) -> str:
        """What requests get that share a batch; nothing of a target that does not fit."""
        if self.backend is None:
            return ""
        equal = "bit for bit" if self.backend.rows_are_exact(self.device) else "to rounding"
        return f"; a request gets the same in batches of any size, {equal}"

    @property
    def rank(self) -> tuple[bool, int, bool]:
        """Smaller is better."""
        order = PREFERENCE if self.device.kind == CUDA else PREFERENCE_ON_CPU
        name = self.target.backend
        return self.device.kind == CPU, order.index(name) if name in order else len(order), not self.exact


def find_fit(target: Target, device: DeviceName | None = None) -> Fit:
    """How a target fits ``device``, by default the best of this machine. No engine is loaded for it."""
    kinds = (CUDA, CPU) if target.device == ANY_DEVICE else (target.device,)
    wanted = [DeviceName(kind) for kind in kinds] if device is None else [device]
    tried = [_fit_on(target, one) for one in wanted]
    for fit in tried:
        if fit.fits:
            return fit
        log.info("%s does not run on %s: %s", target, fit.device, fit.reason)
    return tried[-1]


def _fit_on(target: Target, device: DeviceName) -> Fit:
    try:
        backend = _check(target, device)
        return Fit(target, device, backend, exact=backend.is_made_for(target.needs, device))
    except CachecError as error:
        return Fit(target, device, error=error)


def _check(target: Target, device: DeviceName) -> type[Engine]:
    """The back end's class, or an error: the cheapest questions first, and none that loads an engine."""
    here = platform.system().lower()
    if target.os != here:
        raise BundleError(f"it was built for {target.os}, this is {here}")
    if target.device not in (ANY_DEVICE, device.kind):
        raise BundleError(f"device is {device}, but it was built for {target.device}")
    backend = get_engine(target.backend)
    if backend.needs_same_version and "version_from" not in target.needs and target.version != (version := backend.version()):
        raise BundleError(f"it was built with {backend.name} {target.version}, here is {version}")
    backend.check_target(device, _precision(target))
    backend.check_needs(target.needs, device)
    return backend


def _precision(target: Target) -> str:
    """What kernels and buffers must be there for: bfloat16 if anything crosses a border in it, slots for example."""
    specs = [spec for a in target.engines.values() for spec in (*a.signature.inputs, *a.signature.outputs)]
    return BFLOAT16 if any(spec.dtype == BFLOAT16 for spec in specs) else target.precision


def choose_target(
    targets: Sequence[Target], *, device: DeviceName | None = None, wanted: TargetName | None = None
) -> tuple[Fit, list[Fit]]:
    """The best target that fits here, and the others that were looked at and do not fit.

    Raises:
        BundleError: none fits, or none of the name ``wanted`` is there; with all reasons.
        CachecError: the only one does not fit; of the kind of its reason.
    """
    chosen = [target for target in targets if wanted is None or wanted.matches(target)]
    if not chosen:
        have = "; ".join(map(str, targets))
        raise BundleError(f"it has no target {wanted}, but {have}")
    if device is None and wanted is not None and wanted.device is not None:
        device = DeviceName(wanted.device)
    fits = [find_fit(target, device) for target in chosen]
    good = sorted((fit for fit in fits if fit.fits), key=lambda fit: fit.rank)
    bad = [fit for fit in fits if not fit.fits]
    if not good and len(bad) == 1:
        raise type(bad[0].error or BundleError())(
            f"{in_one_line(bad[0].target)} does not fit: {in_one_line(bad[0].reason, 400)}"
        )
    if not good:
        raise BundleError(
            "no target of the bundle fits here:"
            + "".join(f"\n  {in_one_line(fit.target)}: {in_one_line(fit.reason, 400)}" for fit in bad)
        )
    return good[0], bad


def parse_device(text: str | None) -> DeviceName | None:
    """A device by its name; ``None`` and ``auto`` are for the first GPU, if a target fits it, or the CPU."""
    return None if text in (None, "auto") else DeviceName.parse(str(text))
