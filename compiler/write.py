"""Writing a bundle so that it is there whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.numpy import save

from cachec.runtime.bundle import MANIFEST, Manifest, hash_file, replace_file
from cachec.runtime.errors import OutputError
from cachec.runtime.program import Program


class BundleWriter:
    """Collects files in a hidden directory beside ``out`` and moves them in at the end; a context manager.

    The manifest goes last. Leaving the block without :meth:`commit` removes everything that was collected; a process that
    is killed leaves the hidden directory, which the next build into the same place removes.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        check_output(out, force=force)
        self.out = out
        self._force = force
        self._prefix = f".{out.name}.building-"
        self.staging = out.parent / f"{self._prefix}{os.getpid()}"
        self.files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            for stale in self.out.parent.glob(f"{self._prefix}*"):
                if not _is_alive(int(stale.name.rpartition("-")[2])):
                    shutil.rmtree(stale)
            self.staging.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {self.out.parent}: {error}. Choose another place with -o") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

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
        name = named.relative_to(self.staging).as_posix()
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
        """Move the files to ``out``, then the manifest; then remove files of a bundle that this one replaces."""
        check_output(self.out, force=self._force)
        try:
            for name in self.files:
                target = self.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.staging / name, target)
            replace_file(self.out / MANIFEST, json.dumps(manifest.to_json(), indent=1).encode())
        except OSError as error:
            raise OutputError(f"cannot write the bundle to {self.out}: {error}") from error
        keep = {self.out / name for name in (*self.files, MANIFEST)}
        for path in sorted(self.out.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in keep:
                path.unlink()


def check_output(out: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``out`` exists and may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file: choose another place with -o")
    is_bundle = (out / MANIFEST).is_file()
    looks_like_one = is_bundle or all(p.name in ("engines", "programs", "predictor") for p in out.iterdir())
    if not looks_like_one:
        raise OutputError(f"{out} is a directory with other things in it; cachec will not replace it. Choose another with -o")
    if not force:
        kind = "is a bundle already" if is_bundle else "holds an interrupted build"
        raise OutputError(f"{out} {kind}: pass --force to replace it, or choose another place with -o")


def check_file(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``path`` is a directory, or exists and may not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory: name a file in it")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already: pass --force to replace it, or choose another place with -o")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
