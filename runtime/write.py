"""Writing a bundle so that it is there whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.numpy import save

from cachec.runtime.bundle import FORMAT, MANIFEST, Manifest, hash_file, replace_file
from cachec.runtime.errors import OutputError
from cachec.runtime.program import Program

OWNER = "owner"  # file with the number of the process that adds to a bundle


class BundleWriter:
    """Collects files in a hidden directory beside ``out`` and moves them in at the end; a context manager.

    The manifest goes last. Leaving the block without :meth:`commit` removes everything that was collected; a process that
    is killed leaves the hidden directory, which the next build into the same place removes.

    ``onto``: add to this bundle, which lies at ``out``, instead of making one. One process at a time can.
    """

    def __init__(self, out: Path, *, force: bool, onto: Manifest | None = None) -> None:
        if onto is None:
            check_output(out, force=force)
        self.out = out
        self._force, self._onto = force, onto
        self._prefix = f".{out.name}.building-"
        self.staging = out.parent / (f".{out.name}.adding" if onto else f"{self._prefix}{os.getpid()}")
        self.files: dict[str, dict[str, Any]] = {} if onto is None else {name: dict(e) for name, e in onto.files.items()}

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self._onto is None:
                self._remove_leftovers()
                self.staging.mkdir()
            else:
                self._lock()
        except OSError as error:
            raise OutputError(f"cannot write to {self.out.parent}: {error}. Choose another place with -o") from error
        return self

    def _remove_leftovers(self) -> None:
        for path in list(self.out.parent.iterdir()):
            owner = path.name.removeprefix(self._prefix)
            if path.name.startswith(self._prefix) and owner.isdigit() and not _is_other_process(int(owner)):
                shutil.rmtree(path)

    def _lock(self) -> None:
        """Make the staging directory, whose existence keeps others out; one of a dead process is moved away first."""
        owner = self.staging / OWNER
        try:
            self.staging.mkdir()
        except FileExistsError:
            who = owner.read_text(encoding="utf-8") if owner.is_file() else ""
            if not who.isdigit() or _is_other_process(int(who)):
                raise OutputError(
                    f"process {who or 'unknown'} is adding a target to {self.out}: wait until it is done, or, if it was on "
                    f"another machine and is dead, remove {self.staging}"
                ) from None
            dead = self.staging.with_name(f"{self._prefix}{os.getpid()}")
            self.staging.rename(dead)  # of two processes that both found it dead, one fails here
            shutil.rmtree(dead)
            self.staging.mkdir()
        owner.write_text(str(os.getpid()), encoding="utf-8")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

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

    def commit(self, manifest: Manifest) -> None:
        """Move the files to ``out``, then the manifest; then remove files that only the replaced manifest names."""
        if self._onto is None:
            check_output(self.out, force=self._force)
        replaced = _listed_files(self.out)
        try:
            for name in [name for name in self.files if self._onto is None or (self.staging / name).exists()]:
                target = self.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.staging / name, target)
            replace_file(self.out / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        except OSError as error:
            raise OutputError(f"cannot write the bundle to {self.out}: {error}") from error
        for name in sorted(replaced - set(manifest.files)):
            (self.out / name).unlink(missing_ok=True)
            parent = (self.out / name).parent
            while parent != self.out and not any(parent.iterdir()):
                parent.rmdir()
                parent = parent.parent


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


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, atomically, making its directory.

    Raises:
        OutputError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}. Choose another place") from error


def check_file(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``path`` is a directory, or exists and may not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a file in it")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already: pass --force to replace it, or choose another place with -o")


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
