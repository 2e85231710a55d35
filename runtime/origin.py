"""Where a loaded bundle comes from: its target, and the engines of all sizes that were loaded so far."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine, LoadOptions
from cachec.runtime.errors import BundleError
from cachec.runtime.session import LoadedBundle


class LateEngines(Mapping[str, Engine]):
    """Engines that are loaded when one is first asked for, and again after :meth:`release`."""

    def __init__(self, names: Iterable[str], load: Callable[[], Mapping[str, Engine]]) -> None:
        self._names, self._load = tuple(names), load
        self._held: Mapping[str, Engine] | None = None
        self._lock = threading.Lock()

    def load(self) -> Mapping[str, Engine]:
        with self._lock:
            if self._held is None:
                self._held = self._load()
            return self._held

    @property
    def is_loaded(self) -> bool:
        return self._held is not None

    def release(self) -> None:
        """Close those that are loaded."""
        with self._lock:
            held, self._held = self._held, None
        for engine in (held or {}).values():
            engine.close()

    def __getitem__(self, name: str) -> Engine:
        if name not in self._names:
            raise KeyError(name)
        return self.load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Origin:
    """Where a loaded bundle comes from, and the engines of all sizes that were loaded so far.

    ``late``: they are loaded when they are first run, in place of when they are opened.
    """

    def __init__(
        self, bundle: Bundle, target: Target, engine_type: type[Engine], device: DeviceName, threads: int | None, *, late: bool
    ) -> None:
        self.bundle, self._target, self._type = bundle, target, engine_type
        self.device, self.threads = device, threads
        self._late = late
        self._engines: dict[str, LateEngines] = {}  # by shape bucket
        self._loaded: dict[frozenset[str], LateEngines] = {}  # by their files, which may be of several sizes
        self._opened: dict[tuple[str, int | None, int | None], LoadedBundle] = {}
        self._lock = threading.Lock()
        self._made: Any = None

    def once(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, which is made once for the bundle, and closed with its engines."""
        with self._lock:
            if self._made is None:
                self._made = make()
            return self._made

    def open(self, size: str, steps: int | None, text: int | None = None) -> LoadedBundle:
        """The bundle at a size, number of steps and length of texts, by default the longest.

        Raises:
            InputError: it lacks it.
            BundleError: it has no such engines of this size as of the others.
        """
        with self._lock:
            if (size, steps, text) not in self._opened:
                self._opened[size, steps, text] = self._open(self.bundle.at(size, steps, text))
            return self._opened[size, steps, text]

    def _open(self, bundle: Bundle) -> LoadedBundle:
        target = self._like(bundle)
        if target.shape_bucket not in self._engines:
            self._engines[target.shape_bucket] = self._of_size(bundle, target)
        programs = {level: bundle.program(level) for level in bundle.manifest.programs}
        return LoadedBundle(bundle.manifest, programs, self._engines[target.shape_bucket], target, self)

    def _like(self, bundle: Bundle) -> Target:
        for target in bundle.manifest.targets:
            if replace(target, shape_bucket=self._target.shape_bucket).is_like(self._target):
                return target
        (one,) = bundle.manifest.variants
        raise BundleError(f"the bundle has no engines of {self._target} for the size {one.size}: compile it again")

    def _of_size(self, bundle: Bundle, target: Target) -> LateEngines:
        files = frozenset(artifact.path for artifact in target.engines.values())
        if files not in self._loaded:
            self._loaded[files] = LateEngines(target.engines, partial(self._load, target))
        loaded = engines = self._loaded[files]
        if bundle.manifest.shapes:
            tables = bundle.tables()
            signatures = {name: artifact.signature for name, artifact in target.engines.items()}
            engines = LateEngines(loaded, lambda: {name: one.at(signatures[name], tables) for name, one in loaded.items()})
        if not self._late:
            engines.load()
        return engines

    def _load(self, target: Target) -> Mapping[str, Engine]:
        files = {name: self.bundle.path(artifact.path) for name, artifact in target.engines.items()}
        signatures = {name: artifact.signature for name, artifact in target.engines.items()}
        weights = {name: self.bundle.path(path) for name, path in target.weights.items()}
        return self._type.load(files, signatures, LoadOptions(self.device, self.threads, weights, target.needs))

    def release(self) -> None:
        """Close all engines; they are loaded again when they are run."""
        with self._lock:
            for engines in (*self._engines.values(), *self._loaded.values()):
                engines.release()

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
        for engines in (*self._engines.values(), *self._loaded.values()):
            for engine in engines.values() if engines.is_loaded else ():
                engine.close()


def load_bundle(
    bundle: Bundle,
    target: Target,
    engine_type: type[Engine],
    *,
    device: DeviceName = HOST,
    threads: int | None = None,
    steps: int | None = None,
    late: bool = False,
) -> LoadedBundle:
    """Load the engines of one target of an opened bundle with its back end's engine class; at ``steps``, or its first.

    ``late``: when they are first run.
    """
    return Origin(bundle, target, engine_type, device, threads, late=late).open(target.picture_sizes[0], steps)
