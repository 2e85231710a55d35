"""Writing a bundle so that it is there whole or not at all."""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.numpy import save

from cachec.runtime.bundle import FORMAT, MANIFEST, Bundle, Manifest
from cachec.runtime.errors import OutputError
from cachec.runtime.files import hash_file, replace_file
from cachec.runtime.program import Program

STAGING = ".adding"  # folder in a bundle that is being added to
COLLECTED = ("engines", "timing")  # folders of a bundle in which nothing lies that the manifest does not list


class Collector(ABC):
    """Files for a bundle at ``out``, collected in a folder of their own, ``staging``, until they are moved in at once."""

    out: Path
    staging: Path
    files: dict[str, dict[str, Any]]

    def name_of(self, path: Path) -> str:
        """Name in the bundle of a file that lies in it, or was collected for it."""
        root = self.staging if path.is_relative_to(self.staging) else self.out
        return path.relative_to(root).as_posix()

    def directory(self, name: str) -> Path:
        """A directory of the bundle, to put files into."""
        path = self.staging / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, path: Path) -> str:
        """Name a collected file by its hash and list it; returns its name in the bundle."""
        digest = hash_file(path)
        named = path if digest[:16] in path.name else path.with_name(f"{path.stem}-{digest[:16]}{path.suffix}")
        path.rename(named)
        name = self.name_of(named)
        self.files[name] = {"bytes": named.stat().st_size, "sha256": digest}
        return name

    def add_bytes(self, name: str, content: bytes) -> str:
        """Collect a file with ``content``; returns its name in the bundle."""
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return self.seal(path)

    def add_program(self, level: str, program: Program) -> dict[str, str]:
        """Collect a program's two files; returns their names."""
        text = json.dumps(program.to_json(), indent=1).encode()
        return {
            "json": self.add_bytes(f"programs/{level}.json", text),
            "arrays": self.add_bytes(f"programs/{level}.safetensors", save(program.arrays())),
        }

    @abstractmethod
    def commit(self, manifest: Manifest) -> None:
        """Move the files in, then the manifest; then remove what it no longer names."""

    def _move_in(self, manifest: Manifest) -> None:
        try:
            for name in [name for name in self.files if (self.staging / name).exists()]:
                target = self.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.staging / name, target)
            replace_file(self.out / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        except OSError as error:
            raise OutputError(f"cannot write the bundle to {self.out}: {error}") from error

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            (self.out / name).unlink(missing_ok=True)
            parent = (self.out / name).parent
            while parent != self.out and not any(parent.iterdir()):
                parent.rmdir()
                parent = parent.parent


class BundleWriter(Collector):
    """Makes a bundle; a context manager. Files are collected in a hidden directory beside ``out``.

    Leaving the block without :meth:`commit` removes everything that was collected; a process that is killed leaves the hidden
    directory, which the next build into the same place removes.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        check_output(out, force=force)
        self.out = out
        self._force = force
        self._prefix = f".{out.name}.building-"
        self.staging = out.parent / f"{self._prefix}{os.getpid()}"
        self.files = {}

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            for path in list(self.out.parent.iterdir()):
                owner = path.name.removeprefix(self._prefix)
                if path.name.startswith(self._prefix) and owner.isdigit() and not _is_other_process(int(owner)):
                    shutil.rmtree(path)
            self.staging.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {self.out.parent}: {error}. Choose another place with -o") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def commit(self, manifest: Manifest) -> None:
        check_output(self.out, force=self._force)
        replaced = _listed_files(self.out)
        self._move_in(manifest)
        self._remove(replaced - set(manifest.files))


class BundleAdder(Collector):
    """Adds to a bundle that exists; a context manager. ``bundle`` is as it was when the lock was had.

    The lock is on the directory itself and goes with the process, however that ends; one process at a time has it, also on
    machines that share the disk. Files are collected inside the bundle; what a killed process left there is removed.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        OutputError: another process adds to it, or it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.out = root.resolve()
        self.staging = self.out / STAGING
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if not self.out.is_dir():
            Bundle.open(self.out)  # which says what is wrong
        try:
            self._lock = _lock_directory(self.out)
            self.bundle = Bundle.open(self.out)
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
        except BlockingIOError as error:
            raise OutputError(f"another process is adding a target to {self.out}: wait until it is done") from error
        except OSError as error:
            self._unlock()
            raise OutputError(f"cannot write to the bundle {self.out}: {error}. Add to a copy of it") from error
        except BaseException:  # a damaged bundle: whoever mends it must not find it locked by this process
            self._unlock()
            raise
        self.files = {name: dict(entry) for name, entry in self.bundle.manifest.files.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def commit(self, manifest: Manifest) -> None:
        if Bundle.read_manifest(self.out) != self.bundle.manifest:
            raise OutputError(f"{self.out} was replaced meanwhile, by cachec compile --force: add the target again")
        self._move_in(manifest)
        found = {self.name_of(path) for folder in COLLECTED for path in (self.out / folder).rglob("*") if path.is_file()}
        listed = {name for name in self.bundle.manifest.files if (self.out / name).is_file()}
        self._remove((found | listed) - set(manifest.files))


def _lock_directory(path: Path) -> int | None:
    """A descriptor whose lock no other process has; ``BlockingIOError`` if one has it. Windows has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_output(out: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``out`` exists and may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file: choose another place with -o")
    is_bundle = _is_bundle(out)
    if not is_bundle and not all(p.name in ("engines", "programs", "predictor", "timing") for p in out.iterdir()):
        raise OutputError(f"{out} is a directory with other things in it; cachec will not replace it. Choose another with -o")
    if not force:
        kind = "is a bundle already" if is_bundle else "holds an interrupted build"
        raise OutputError(f"{out} {kind}: pass --force to replace it, or choose another place with -o")


def _is_bundle(out: Path) -> bool:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _listed_files(out: Path) -> set[str]:
    """Files of the bundle that is replaced: those, and nothing else, are removed."""
    if not _is_bundle(out):
        return set()
    files = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("files", {})
    return {name for name in files if (out / name).resolve().is_relative_to(out.resolve())}


def _is_other_process(pid: int) -> bool:
    """True for the number of a live process that is not this one (in a container, a killed build often had ours)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
