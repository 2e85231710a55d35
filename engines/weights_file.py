"""A bundle's weights file while it is written: every tensor once, hashed on the way, going on where a process was killed.

Beside the file lies a note of every tensor that is whole in it: what it is, where it ends, and the SHA-256 of all bytes up to
there. A note counts only if the same tensor is wanted there and the bytes have this hash, so nothing is kept that is torn,
altered, or of another model.
"""

import functools
import hashlib
import json
import logging
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cachec.runtime.files import writing
from cachec.runtime.room import check_disk, in_bytes

log = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes; of tensors in the weights file, so that it can be mapped
CHUNK = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Unfinished:
    """Where a weights file is until it is whole, and ``facts`` that say what it is of."""

    folder: Path
    facts: Mapping[str, str]


@dataclass(frozen=True)
class _Note:
    """A tensor ``what`` is whole, and ends at byte ``end``; the note begins at byte ``at`` of the notes."""

    what: str
    end: int
    sha256: str
    at: int


class WeightsFile:
    """A weights file until :meth:`finish`; a context manager.

    What an interrupted process left there is used if its facts are the same; else the file begins anew.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, unfinished: Unfinished) -> None:
        self._path, self._notes_path = (unfinished.folder / name for name in ("weights.part", "weights.notes"))
        self._header = _line(unfinished.facts)
        self._hash, self._end, self._size = hashlib.sha256(), 0, 0
        self._left: deque[_Note] = deque()
        self._whole = 0  # bytes, up to the end of the last tensor that is there
        self._stack = ExitStack()

    @property
    def digest(self) -> str:
        """SHA-256 of what is there."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        with self._writing(), ExitStack() as stack:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            notes, self._left = _read_notes(self._notes_path, self._header)
            self._stream = stack.enter_context(self._path.open("r+b" if self._left and self._path.exists() else "w+b"))
            self._notes = stack.enter_context(self._notes_path.open("r+b" if self._left else "w+b"))
            if self._left:
                self._notes.seek(notes)
                self._notes.truncate()
            else:
                self._note(self._header)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._writing():
            try:
                self._stack.close()
            finally:
                if not self._whole and not self._left:  # there is nothing to go on from
                    for path in (self._path, self._notes_path):
                        path.unlink(missing_ok=True)

    def expect(self, sizes: Iterable[int]) -> None:
        """Tensors of so many bytes will be placed: is there room for them, and what is there already?

        Raises:
            OutputError: there is no room.
        """
        size = functools.reduce(lambda end, bytes_: _aligned(end) + bytes_, sizes, 0)
        there = min(self._left[-1].end, self._path.stat().st_size) if self._left else 0
        if there:
            log.warning("continues: %s of %s of weights are there", in_bytes(there), in_bytes(size))
        what = "the rest of the weights file" if there else "the weights file"
        self._size = size
        check_disk(self._path.parent, size - there, what, self._advice)

    def place(self, tensor: Hashable, contents: Iterable[Any]) -> tuple[int, int]:
        """Where a tensor lies: its first byte, and how many. ``tensor`` is the same, in all processes, for the same values.

        ``contents``, its bytes in pieces, are asked for only if they are not there yet.
        """
        what = hashlib.sha256(repr(tensor).encode()).hexdigest()
        begin = _aligned(self._end)
        with self._writing():
            if not self._is_there(what):
                self._write(bytes(begin - self._end))
                for content in contents:
                    self._write(content)
                self._stream.flush()
                self._note(_line({"what": what, "end": self._end, "sha256": self.digest}))
            self._whole = self._end
        return begin, self._end - begin

    def finish(self, folder: Path) -> Path:
        """Move the file into ``folder``, named by its hash; nothing is left where it was."""
        with self._writing():
            self._stream.truncate(self._end)
            self._stack.close()
        named = folder / f"weights-{self.digest[:16]}.bin"
        with writing(named):
            self._path.replace(named)
            self._notes_path.unlink()
        return named

    def _is_there(self, what: str) -> bool:
        """Is it what comes next, whole? Else nothing of what comes next is kept."""
        if not self._left:
            return False
        note = self._left.popleft()
        digest = self._digest_to(note.end)
        if same := note.what == what and digest.hexdigest() == note.sha256:
            self._hash, self._end = digest, note.end
        else:
            self._left.clear()
            self._notes.seek(note.at)
            self._notes.truncate()
            self._stream.seek(self._end)
            log.warning("the weights file is kept up to byte %d: what comes next there is something else", self._end)
        if not self._left:
            self._stream.truncate(self._end)  # the tail may be torn
        return same

    def _digest_to(self, end: int) -> Any:
        """The hash of all bytes up to ``end``; of fewer if there are fewer."""
        digest, place = self._hash.copy(), self._end
        self._stream.seek(place)
        while place < end and (content := self._stream.read(min(CHUNK, end - place))):
            digest.update(content)
            place += len(content)
        return digest

    def _write(self, content: Any) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self._end += memoryview(content).nbytes

    def _note(self, line: bytes) -> None:
        self._notes.write(line)
        self._notes.flush()

    @property
    def _advice(self) -> str:
        kept = max(self._whole, self._left[-1].end if self._left else 0)
        goes_on = (
            f". {in_bytes(kept)} of {in_bytes(self._size)} are kept, and the same command goes on with them" if kept else ""
        )
        return f"choose another place{goes_on}"

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._path, advice=self._advice)


def _read_notes(path: Path, header: bytes) -> tuple[int, deque[_Note]]:
    """Bytes of the notes that can be read, and the notes, if they begin with this ``header``."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0, deque()
    if not lines or lines[0] != header:
        log.info("%s is of other weights, and begins anew", path)
        return 0, deque()
    at, notes = len(header), deque[_Note]()
    for line in lines[1:]:
        try:
            note = _Note(**json.loads(line), at=at)
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):  # torn, like what cannot be read
            break
        notes.append(note)
        at += len(line)
    return at, notes


def _aligned(end: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(content), sort_keys=True).encode() + b"\n"
