"""Files: hashed, replaced atomically, checked before they are written, and read as people's editors save them."""

import codecs
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachec.runtime.errors import InputError, OutputError, in_one_line

# how files begin that are not UTF-8; the marks of UTF-32 first, which begin like those of UTF-16
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(place: Path, *kinds: type[Exception], advice: str = "choose another place") -> Iterator[None]:
    """What fails in this block is a write to ``place``.

    ``kinds``: what a library raises where the file system fails, beside ``OSError``.

    Raises:
        OutputError: in one line, with the place, the reason and ``advice``.
    """
    failures: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except failures as error:
        at = getattr(error, "filename", None)  # where it is above the place, that is what is in the way
        above = f"{at}: " if isinstance(at, str) and Path(at) in place.parents else ""
        raise OutputError(f"cannot write {place}: {above}{reason_of(error)}. Make room there, or {advice}") from error


def reason_of(error: Exception) -> str:
    """Why a file could not be read or written, in a few words without the place."""
    return getattr(error, "strerror", None) or in_one_line(error)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, making its directory; a reader sees the old file or the new one, never a part.

    A link is replaced, not what it points to.

    Raises:
        OutputError: the place cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder that is gone after the block.

    Raises:
        OutputError: there is no place for one.
    """
    with writing(Path(os.environ.get("TMPDIR", "/tmp")), advice="name another with TMPDIR"):
        folder = tempfile.TemporaryDirectory(prefix="cachec-")
    with folder as name:
        yield Path(name)


def read_text_file(path: Path, what: str) -> str:
    r"""The text of a file that people write: UTF-8 with or without byte order mark; lines end with ``\n``, however saved.

    Raises:
        InputError: it cannot be read, or has another encoding; names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {reason_of(error)}") from error
    for mark, encoding in _OTHER_ENCODINGS:
        if content.startswith(mark):
            raise InputError(f"{what} {path} is saved as {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = 1 + content.count(b"\n", 0, error.start), content[error.start]
        raise InputError(f"{what} {path} is not UTF-8: line {line} has a byte {byte:#04x}. Save it as UTF-8") from error
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise InputError(f"{what} {path} is no text: line {line} has a zero byte, as UTF-16 has. Save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def cache_folder() -> Path:
    """Where this machine's own notes are kept: ``CACHEC_CACHE``, or ``cachec`` in the user's cache."""
    base = os.environ.get("CACHEC_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cachec")
    return Path(base).expanduser()


def check_file(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` if ``path`` is no file, exists and may not be replaced, or nothing can be written there."""
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a directory: name a file in it")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe, which would be replaced: name a file")
        if os.path.lexists(path) and not force:
            raise OutputError(f"{path} exists already: pass --force to replace it, or choose another place with -o")
        there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise OutputError(f"cannot write {path}: {there} is a file. Choose another place with -o")
    if not os.access(there, os.W_OK):
        raise OutputError(f"cannot write {path}: {there} may not be written. Choose another place with -o")
