"""Where a loaded bundle comes from: its target, and the engines of all sizes that were loaded so far."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine, LoadOptions
from cachec.runtime.errors import BundleError
from cachec.runtime.session import LoadedBundle


class Origin:
    """Where a loaded bundle comes from, and the engines of all sizes that were loaded so far."""

    def __init__(
        self, bundle: Bundle, target: Target, engine_type: type[Engine], device: DeviceName, threads: int | None
    ) -> None:
        self.bundle, self._target, self._type = bundle, target, engine_type
        self.device, self.threads = device, threads
        self._engines: dict[str, Mapping[str, Engine]] = {}  # by size
        self._loaded: dict[frozenset[str], Mapping[str, Engine]] = {}  # by their files, which may be of several sizes
        self._lock = threading.Lock()
        self._made: Any = None

    def once(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, which is made once for the bundle, and closed with its engines."""
        with self._lock:
            if self._made is None:
                self._made = make()
            return self._made

    def open(self, size: str, steps: int | None) -> LoadedBundle:
        """The bundle at a size and number of steps.

        Raises:
            InputError: it lacks it.
            BundleError: it has no such engines of this size as of the others.
        """
        bundle = self.bundle.at(size, steps)
        target = self._like(bundle)
        with self._lock:
            if target.shape_bucket not in self._engines:
                self._engines[target.shape_bucket] = self._of_size(bundle, target)
            engines = self._engines[target.shape_bucket]
        programs = {level: bundle.program(level) for level in bundle.manifest.programs}
        return LoadedBundle(bundle.manifest, programs, engines, target, self)

    def _like(self, bundle: Bundle) -> Target:
        for target in bundle.manifest.targets:
            if replace(target, shape_bucket=self._target.shape_bucket).is_like(self._target):
                return target
        (one,) = bundle.manifest.variants
        raise BundleError(f"the bundle has no engines of {self._target} for the size {one.size}: compile it again")

    def _of_size(self, bundle: Bundle, target: Target) -> Mapping[str, Engine]:
        files = frozenset(artifact.path for artifact in target.engines.values())
        loaded = self._loaded[files] = self._loaded.get(files) or self._load(target)
        if not bundle.manifest.shapes:
            return loaded
        tables = bundle.tables()
        return {name: one.at(target.engines[name].signature, tables) for name, one in loaded.items()}

    def _load(self, target: Target) -> Mapping[str, Engine]:
        files = {name: self.bundle.path(artifact.path) for name, artifact in target.engines.items()}
        signatures = {name: artifact.signature for name, artifact in target.engines.items()}
        weights = {name: self.bundle.path(path) for name, path in target.weights.items()}
        return self._type.load(files, signatures, LoadOptions(self.device, self.threads, weights, target.needs))

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
        for engines in (*self._engines.values(), *self._loaded.values()):
            for engine in engines.values():
                engine.close()


def load_bundle(
    bundle: Bundle,
    target: Target,
    engine_type: type[Engine],
    *,
    device: DeviceName = HOST,
    threads: int | None = None,
    steps: int | None = None,
) -> LoadedBundle:
    """Load the engines of one target of an opened bundle with its back end's engine class; at ``steps``, or its first."""
    return Origin(bundle, target, engine_type, device, threads).open(target.picture_sizes[0], steps)
