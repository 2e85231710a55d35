"""Writing a bundle so that it is there whole or not at all."""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.numpy import save

from cachec.runtime.bundle import FORMAT, MANIFEST, Bundle, Manifest, is_inside
from cachec.runtime.checked_files import remember_hash
from cachec.runtime.errors import OutputError
from cachec.runtime.files import hash_file, write_file, writing
from cachec.runtime.program import Program
from cachec.runtime.specs import Array
from cachec.runtime.work import LOCK, fresh_folder, holding

STAGING = ".adding"  # folder in a bundle that is being added to
COLLECTED = ("engines", "timing", "components")  # folders of a bundle in which nothing lies that the manifest does not list


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
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, path: Path, digest: str | None = None) -> str:
        """Name a collected file by its hash and list it; returns its name in the bundle.

        ``digest``: its SHA-256, if it is known: large files are hashed while they are written.
        """
        with writing(path):
            digest = digest or hash_file(path)
            named = path if digest[:16] in path.name else path.with_name(f"{path.stem}-{digest[:16]}{path.suffix}")
            path.rename(named)
            name = self.name_of(named)
            self.files[name] = {"bytes": named.stat().st_size, "sha256": digest}
        return name

    def drop(self, name: str) -> None:
        """Remove what was collected in the directory ``name``, if anything was."""
        with writing(self.staging):
            if (self.staging / name).is_dir():
                shutil.rmtree(self.staging / name)
        self.files = {file: entry for file, entry in self.files.items() if not file.startswith(f"{name}/")}

    def add_bytes(self, name: str, content: bytes) -> str:
        """Collect a file with ``content``; returns its name in the bundle."""
        path = self.staging / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self.seal(path)

    def add_program(self, level: str, program: Program) -> dict[str, str]:
        """Collect a program's two files; returns their names."""
        text = json.dumps(program.to_json(), indent=1).encode()
        return {
            "json": self.add_bytes(f"programs/{level}.json", text),
            "arrays": self.add_bytes(f"programs/{level}.safetensors", save(program.stored())),
        }

    def add_tables(self, label: str, tables: Mapping[str, Array]) -> str:
        """Collect what engines for several sizes read at one, called ``label`` in names of files; returns its name."""
        return self.add_bytes(f"tables/{label}.safetensors", save(dict(tables)))

    @abstractmethod
    def commit(self, manifest: Manifest) -> None:
        """Move the files in, then the manifest; then remove what it no longer names."""

    def _move_in(self, manifest: Manifest) -> None:
        try:
            self._move(manifest)
        except BaseException:  # unless the manifest is there already, nothing is: it was the last
            self._remove(self.files.keys() - _listed_files(self.out))
            raise

    def _move(self, manifest: Manifest) -> None:
        with writing(self.out):
            for name in [name for name in self.files if (self.staging / name).exists()]:
                target = self.out / name
                self._make_folder(target.parent)
                os.replace(self.staging / name, target)
                remember_hash(target, self.files[name])
            for left in self.out.glob(f".{MANIFEST}.*"):  # by who was killed here
                left.unlink()
            write_file(self.out / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != folder:
            raise OutputError(
                f"{folder} is a link to {folder.resolve()}, which is left alone: copy the bundle with its links resolved "
                "(cp -rL), or choose another place with -o"
            )

    def _remove(self, names: Iterable[str]) -> None:
        with writing(self.out):
            for name in sorted(names):
                path = self.out / name
                if path.parent.resolve() != path.parent:  # behind a link to another place
                    continue
                path.unlink(missing_ok=True)
                while path.parent != self.out and path.parent.is_dir() and not any(path.parent.iterdir()):
                    path = path.parent
                    path.rmdir()


class BundleWriter(Collector):
    """Makes a bundle; a context manager. Files are collected in a hidden directory beside ``out``, of a random name.

    Several may make the same bundle at once: each is whole, and the last one stays. Leaving the block without :meth:`commit`
    removes everything that was collected; what a killed process leaves goes with the next build into the same place.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        check_output(out, force=force)
        self.out = out.resolve()
        self._force = force
        self._stack = ExitStack()
        self.files = {}

    def __enter__(self) -> Self:
        self.staging = self._stack.enter_context(fresh_folder(self.out.parent, f".{self.out.name}.building-"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def commit(self, manifest: Manifest) -> None:
        with _committing(self.out):
            check_output(self.out, force=self._force)
            replaced = _listed_files(self.out)
            self._move_in(manifest)
            self._remove(replaced - set(manifest.files))


class BundleAdder(Collector):
    """Adds to a bundle that exists; a context manager. ``bundle`` is as it was when the lock was had.

    One process at a time adds to a bundle. Files are collected inside it; what a killed process left there is removed.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        OutputError: another process adds to it, or it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.out = root.resolve()
        self.staging = self.out / STAGING
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        Bundle.read_manifest(self.out)  # so that nothing is made in what is no bundle
        with ExitStack() as stack:
            stack.enter_context(holding(self.staging / LOCK, f"another process is adding to {self.out}"))
            stack.callback(shutil.rmtree, self.staging, ignore_errors=True)
            self._clear()
            self.bundle = Bundle.open(self.out)
            self._stack = stack.pop_all()
        self.files = {name: dict(entry) for name, entry in self.bundle.manifest.files.items()}
        return self

    def _clear(self) -> None:
        with writing(self.staging):
            for path in self.staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def commit(self, manifest: Manifest) -> None:
        with _committing(self.out):
            if Bundle.read_manifest(self.out) != self.bundle.manifest:
                raise OutputError(f"{self.out} was replaced meanwhile, by cachec compile --force: give this command again")
            self._move_in(manifest)
            found = {self.name_of(path) for folder in COLLECTED for path in (self.out / folder).rglob("*") if path.is_file()}
            listed = {name for name in self.bundle.manifest.files if (self.out / name).is_file()}
            self._remove((found | listed) - set(manifest.files))

    def commit_programs(
        self,
        programs: Mapping[str, Mapping[str, str]],
        levels: Mapping[str, Any],
        *,
        size: str | None = None,
        steps: int | None = None,
    ) -> None:
        """Let the bundle have these files of ``programs`` by level, and these facts of ``levels``; files of others go.

        ``size`` and ``steps``: of which these are; by default of the bundle's first.
        """
        old = self.bundle.manifest
        new = old.with_programs(programs, levels, size, steps)
        before, used = (
            {name for one in found.variants for level in one.programs.values() for name in level.values()}
            for found in (old, new)
        )
        files = {name: entry for name, entry in self.files.items() if name in used or name not in before}
        self.commit(replace(new, files=files))


def _committing(out: Path) -> AbstractContextManager[None]:
    """While files are moved into a bundle, nobody else moves any."""
    return holding(out / LOCK, f"another process is writing the bundle {out}", wait=True)


def check_output(out: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``out`` exists and may not be replaced."""
    with writing(out):
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(f"{out} is a file: choose another place with -o")
        names = {path.name for path in out.iterdir() if not _is_ours_for_a_while(path.name)}
    if not names:
        return
    is_bundle = _is_bundle(out)
    if not is_bundle and not names <= {"engines", "programs", "predictor", "timing", "drop_in", "tables", "components"}:
        raise OutputError(f"{out} is a directory with other things in it; cachec will not replace it. Choose another with -o")
    if not force:
        kind = "is a bundle already" if is_bundle else "holds an interrupted build"
        raise OutputError(f"{out} {kind}: pass --force to replace it, or choose another place with -o")


def _is_ours_for_a_while(name: str) -> bool:
    """Is it a name that is in a bundle only while it is written, or left by who was killed then?"""
    return name in (LOCK, STAGING) or name.startswith(f".{MANIFEST}.")


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
    return {name for name in files if is_inside(name)} if isinstance(files, dict) else set()
