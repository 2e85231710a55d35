"""Back ends by name. One file each, imported only when used; every one can build and run (see ``runtime.engine``)."""

import importlib
from pathlib import Path

from cachec.runtime.bundle import Bundle
from cachec.runtime.engine import Engine
from cachec.runtime.errors import unknown_name
from cachec.runtime.session import LoadedBundle, load_bundle

BACKENDS = {
    "eager": "cachec.engines.eager:EagerEngine",
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


def open_bundle(root: Path, *, verify: bool = False, threads: int | None = None) -> LoadedBundle:
    """Check the bundle at ``root`` and load its engines."""
    bundle = Bundle.open(root, verify=verify)
    return load_bundle(bundle, get_backend(bundle.target.backend), threads=threads)
