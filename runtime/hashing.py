"""Hashes of large files, made in a thread beside other work."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 20  # bytes; while hashlib and the system work on them, other threads run


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """Begin to hash ``files`` in a thread, one after the other, and do the block meanwhile.

    What it gives waits for their SHA-256, in hexadecimal, or raises what the thread met: ``OSError``. When the block is over,
    so is the thread, done or not.
    """
    over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="hashing") as pool:
        digests = pool.submit(lambda: [_hash(file, over) for file in files])
        try:
            yield digests.result
        finally:
            over.set()


def _hash(file: Path, over: threading.Event) -> str:
    digest, room = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(room):
            if over.is_set():
                raise CancelledError
            digest.update(room[:count])
    return digest.hexdigest()
