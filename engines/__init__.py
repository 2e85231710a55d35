"""Back ends by name. One file each, imported only when used; every one can build and run (see ``runtime.engine``)."""

import importlib
import logging
import os
import platform
from pathlib import Path

from cachec.runtime.bundle import ANY_DEVICE, Bundle
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import BundleError, InputError, unknown_name
from cachec.runtime.session import LoadedBundle, load_bundle

log = logging.getLogger(__name__)

BACKENDS = {
    "aoti": "cachec.engines.aoti:AotiEngine",
    "eager": "cachec.engines.eager:EagerEngine",
    "inductor": "cachec.engines.inductor:InductorEngine",
    "ort": "cachec.engines.ort:OrtEngine",
}


def get_backend(name: str) -> type[Engine]:
    """The engine class of a back end.

    Raises:
        InputError: there is no such back end; with the nearest name.
        MissingExtraError: its library is not installed.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    module, _, attribute = BACKENDS[name].partition(":")
    backend: type[Engine] = getattr(importlib.import_module(module), attribute)
    return backend


def check_threads(threads: int | None) -> None:
    """Raise ``InputError`` for a number of threads that is none; warn about more than there are cores."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores:
        log.warning("threads is %d, but this process has %d cores: more threads than cores wait for each other", threads, cores)


def open_bundle(root: Path, *, device: str = "cpu", verify: bool = False, threads: int | None = None) -> LoadedBundle:
    """Check the bundle at ``root`` and load its engines on ``device``: ``cpu``, ``cuda``, or ``cuda:1`` for the second GPU.

    Raises:
        BundleError: it is damaged, or was built for another operating system, device or version of its back end.
        InputError: there is no such device here.
    """
    check_threads(threads)
    name = DeviceName.parse(device)
    bundle = Bundle.open(root, verify=verify)
    target = bundle.target
    backend = get_backend(target.backend)
    if target.os != platform.system().lower():
        raise BundleError(f"{root} was built for {target.os}, this is {platform.system().lower()}: {_again(bundle)}")
    if backend.needs_same_version and target.version != backend.version():
        raise BundleError(
            f"{root} was built with {backend.name} {target.version}, here is {backend.version()}: {_again(bundle)}"
        )
    if target.device not in (ANY_DEVICE, name.kind):
        raise BundleError(
            f"device is {device}, but {root} was built for {target.device}: open it there, or {_again(bundle)} "
            f"--backend {backend.name} --device {name.kind}"
        )
    backend.check_target(name, target.precision)
    return load_bundle(bundle, backend, device=name, threads=threads)


def _again(bundle: Bundle) -> str:
    manifest = bundle.manifest
    return f"make one that fits with cachec compile {manifest.model['source']} --method {manifest.method['name']}"
