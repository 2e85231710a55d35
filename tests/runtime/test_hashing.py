"""Hashes from a thread: the same as from a file, errors where they are asked for, and nothing runs on."""

import hashlib
import os
import threading
from concurrent.futures import CancelledError
from contextlib import suppress

import pytest

from cachec.runtime.hashing import CHUNK, hashing


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_hashes_are_those_of_the_files(tmp_path):
    contents = [b"", b"a" * CHUNK, os.urandom(2 * CHUNK + 1)]
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    with hashing(files) as digests:
        assert digests() == digests() == [hashlib.sha256(content).hexdigest() for content in contents]


def test_an_error_is_raised_where_the_hash_is_wanted(tmp_path):
    with hashing([tmp_path / "missing"]) as digests, pytest.raises(FileNotFoundError, match="missing"):
        digests()
    with hashing([tmp_path / "missing"]):  # which nobody asks for
        pass


def test_the_thread_is_over_when_the_block_is(tmp_path):
    endless = tmp_path / "pipe"
    os.mkfifo(endless)
    feeder = threading.Thread(target=_feed, args=(endless,))
    with suppress(KeyboardInterrupt), hashing([endless]) as digests:
        feeder.start()
        assert threads()
        raise KeyboardInterrupt
    assert not threads()
    feeder.join()
    with pytest.raises(CancelledError):
        digests()


def _feed(pipe):
    with suppress(BrokenPipeError), pipe.open("wb", buffering=0) as writer:
        while True:
            writer.write(bytes(CHUNK))
