"""Files that PyTorch's own writer writes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cachec.runtime.files import writing


@contextmanager
def archive(path: Path) -> Iterator[Any]:
    """Where ``torch.export.save`` and its like write to, for the file ``path``.

    Given the path itself, PyTorch ends the whole process when the disk is full: its writer fails once more when it is taken
    down, where nobody can catch it.

    Raises:
        OutputError: the place cannot be written.
    """
    with writing(path), path.open("wb") as file:
        sink = _Sink(file)
        yield sink
        if sink.error is not None:
            raise sink.error


class _Sink(io.RawIOBase):
    """Takes all that is written, and writes it as long as that works. ``error``: what ended that."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Back to the beginning, for who reads next: nobody here."""
        return offset

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes
