"""Files: hashed, replaced atomically, checked before they are written."""

import hashlib
import os
import tempfile
from pathlib import Path

from cachec.runtime.errors import OutputError


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """Where this machine's own notes are kept: ``CACHEC_CACHE``, or ``cachec`` in the user's cache."""
    base = os.environ.get("CACHEC_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cachec")
    return Path(base).expanduser()


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
