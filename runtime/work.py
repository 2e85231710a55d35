"""Folders that one process works in at a time, whatever else runs: threads, containers, other machines on the same disk.

Who works in a folder holds the lock of the file ``.lock`` in it, which the system lets go when that process ends, however it
ends. Process numbers say nothing: each container counts its own. On disks and systems without locks, that the file is there is
the lock; nobody takes it away, so a folder whose owner was killed counts as free only when nothing in it has changed for a day.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cachec.runtime.errors import InputError, OutputError
from cachec.runtime.files import write_file, writing

LOCK = ".lock"
STALE_SECONDS = 24 * 3600.0
WAIT_SECONDS = 60.0  # for who moves files into a bundle, which takes less than a second
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def fresh_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder of a random name in ``parent``, which is removed at the end.

    Folders with this ``prefix`` whose owners are gone are removed, too.

    Raises:
        OutputError: ``parent`` cannot be written.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for path in [path for path in parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]:
            with suppress(PermissionError):  # it is another user's, who will remove it
                _remove_left(path)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        with holding(
            folder / LOCK, f"another process took {folder}", wait=True
        ):  # who looks for left ones may have it just now
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def claim_work(path: Path, what: str, facts: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Make the folder ``path`` the place of this very ``what``, or go on with what was left there.

    What lies in it at the end stays for the next try, until :func:`remove_work`; an empty folder goes.

    Raises:
        InputError: it holds unfinished work with other ``facts``.
        OutputError: another process works there, or it cannot be written.
    """
    try:
        with holding(path / LOCK, f"another process works on this {what}, in {path}"):
            if facts is not None:
                _check_facts(path, what, facts)
            yield path
    finally:
        with suppress(OSError):  # it is not empty, or there is none
            path.rmdir()


def remove_work(path: Path) -> None:
    """Remove a work folder whose result is there, unless another process has begun to use it: then it is that one's."""
    if not path.is_dir():
        return
    with writing(path):
        _remove_left(path, unclaimed_seconds=0.0)


def _check_facts(folder: Path, what: str, facts: Mapping[str, str]) -> None:
    path = folder / f"{what}.json"
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if known != dict(facts):
            raise InputError(f"{folder} holds an unfinished {what} with other settings: finish it, or remove that directory")
    write_file(path, json.dumps(dict(facts), indent=1).encode())


@contextmanager
def holding(path: Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made with its folder. ``busy`` says what it means that another has it.

    ``wait``: for a minute, until it is free.

    Raises:
        OutputError: another has it, or it cannot be made.
    """
    until = time.monotonic() + (WAIT_SECONDS if wait else 0.0)
    with writing(path.parent):
        while (lock := _take(path)) is None:
            if time.monotonic() >= until:
                raise OutputError(f"{busy}: wait until it is done. If none is, remove {path}")
            time.sleep(0.05)
    try:
        yield
    finally:
        _let_go(path, lock)


def _remove_left(folder: Path, unclaimed_seconds: float = STALE_SECONDS) -> None:
    """Remove a folder that its owner left; one without a lock file after a while, for it may just be about to get one."""
    lock = folder / LOCK
    if not lock.exists():
        if _age(folder) >= unclaimed_seconds:
            shutil.rmtree(folder, ignore_errors=True)
        return
    held = _take(lock)
    if held is not None:
        shutil.rmtree(folder, ignore_errors=True)
        _let_go(lock, held)


def _take(path: Path) -> int | None:
    """A descriptor that holds the lock of ``path``, or ``None`` if another has it."""
    while True:
        try:
            descriptor, made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        except FileExistsError:
            try:
                descriptor, made = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # let go meanwhile
                continue
        try:
            had = _lock(descriptor)
            if had is None:
                had = made or _age(path.parent) >= STALE_SECONDS
            if had and _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not had:
            return None


def _lock(descriptor: int) -> bool | None:
    """Is the file's lock ours now? ``None`` where there are no locks: on Windows, and on some network disks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Is ``path`` the file that was opened, and not removed or made anew by who had it before?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go(path: Path, descriptor: int) -> None:
    """Remove the file while its lock is held, so that whoever waits for it sees that it is another one."""
    if _is_still(path, descriptor):
        path.unlink()
    os.close(descriptor)


def _age(folder: Path) -> float:
    """Seconds since anything in it changed."""
    try:
        return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # something went while it was looked at
        return 0.0
