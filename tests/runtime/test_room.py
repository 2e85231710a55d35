"""What there is no room for is refused with how much it takes and how much there is."""

from collections import namedtuple

import pytest

from cachec.runtime import room
from cachec.runtime.errors import EngineError, OutputError
from cachec.runtime.room import check_disk, check_memory, in_bytes


def test_a_disk_is_looked_at_where_the_place_will_be(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: seen.append(path) or namedtuple("usage", "free")(5e9))
    check_disk(tmp_path / "a" / "b", 5e9, "the bundle")
    assert seen == [tmp_path]
    wanted = (
        rf"the bundle takes 5.10 GB of disk, and {tmp_path} has 5.00 GB left: make room there, or choose another place with"
    )
    with pytest.raises(OutputError, match=wanted):
        check_disk(tmp_path / "a", 5.1e9, "the bundle")


def test_memory_is_refused_where_it_is_known_not_to_be_there(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda: 10)
    check_memory(10, "it", "wait")
    with pytest.raises(EngineError, match=r"it takes 11.00 B of memory, and this machine has 10.00 B free: wait"):
        check_memory(11, "it", "wait")
    monkeypatch.setattr(room, "free_memory", lambda: None)
    check_memory(1e30, "it", "wait")


def test_bytes_are_written_with_their_units():
    assert [in_bytes(size) for size in (0, 999, 25.2e6, 23.8e9)] == ["0.00 B", "999.00 B", "25.20 MB", "23.80 GB"]
