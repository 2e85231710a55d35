"""Files of bundles, checked by size and hash; what was hashed once on this machine is known by its place, size and time."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachec.runtime.errors import BundleError, OutputError, in_one_line, shortened
from cachec.runtime.files import cache_folder, hash_file, reason_of, write_file

log = logging.getLogger(__name__)

LARGE_FILE_BYTES = 64 * 2**20  # files above are hashed once per machine, then known by size and time


def check_file(path: Path, entry: Mapping[str, Any], *, verify: bool) -> None:
    """Raise ``BundleError`` unless a file is as its ``entry`` says; ``verify`` hashes it even if it was hashed before."""
    shown = in_one_line(path, 300)
    try:
        stat, known_as = path.stat(), _memory_key(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{shown} is missing from the bundle: copy the whole directory, or compile it again") from error
    except (OSError, ValueError) as error:  # a name that no file can have, a loop of links, no permission
        raise BundleError(f"{shown} cannot be read: {reason_of(error)}") from error
    if stat.st_size != entry["bytes"]:
        says = shortened(entry["bytes"])
        raise BundleError(f"{shown} has {stat.st_size} bytes, the manifest says {says}: the copy is incomplete")
    remembered = stat.st_size > LARGE_FILE_BYTES and not verify
    if remembered and _known_hashes().get(known_as) == entry["sha256"]:
        return
    if _hash_bundled(path) != entry["sha256"]:
        raise BundleError(f"{shown} does not match its SHA-256: it was altered or damaged. Compile the bundle again")
    if stat.st_size > LARGE_FILE_BYTES:
        _remember(known_as, entry["sha256"])


def _hash_bundled(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise BundleError(f"{in_one_line(path, 300)} cannot be read: {reason_of(error)}") from error


def _memory_file() -> Path:
    return cache_folder() / "verified.json"


def _memory_key(path: Path) -> str:
    """What a file is known by: where it lies, behind all links, and which file that is, of which size and times.

    The time of its last change of any kind is one of them: unlike the time of the last write, it cannot be set.
    """
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _known_hashes() -> dict[str, str]:
    """What this machine has hashed before; nothing if that cannot be read: it only saves time."""
    try:
        known = json.loads(_memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember_hash(path: Path, entry: Mapping[str, Any]) -> None:
    """A file with this ``entry`` in a manifest was hashed: if it is large, that need not be done again on this machine."""
    if entry["bytes"] > LARGE_FILE_BYTES:
        _remember(_memory_key(path), entry["sha256"])


def _remember(key: str, digest: str) -> None:
    try:
        write_file(_memory_file(), json.dumps({**_known_hashes(), key: digest}).encode())
    except OutputError as error:  # a read-only home: the file is hashed again next time
        log.info("the hash of %s is not remembered: %s", key, error)
