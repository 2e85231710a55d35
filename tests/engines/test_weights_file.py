"""What is left of a weights file is used as far as it is whole and of the same weights, and the result has the same bytes."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from full_disk import full_disk

from cachec.engines.weights_file import ALIGNMENT, Unfinished, WeightsFile
from cachec.runtime.errors import OutputError
from cachec.runtime.files import hash_file

FACTS = {"weights_sha256": "aa"}
TENSORS = {f"blocks.{number}": bytes([number]) * (1500 + 4000 * (number % 3)) for number in range(24)}


def write(work, out, tensors=TENSORS, facts=FACTS, *, stop_at=None, how=None):
    """All tensors; returns the file, where they lie, and those that were asked for. At ``stop_at`` something happens."""
    asked = []

    def contents(name):
        if name == stop_at:
            how()
        asked.append(name)
        yield tensors[name][:100]
        yield tensors[name][100:]

    with WeightsFile(Unfinished(work, facts)) as file:
        file.expect(map(len, tensors.values()))
        places = {name: file.place((name, "float32"), contents(name)) for name in tensors}
        path = file.finish(out)
        assert path.name == f"weights-{file.digest[:16]}.bin"
        assert hash_file(path) == file.digest
    return path, places, asked


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(tmp_path):
    """A folder in which the first 17 tensors are."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "work", tmp_path, stop_at="blocks.17", how=interrupt)
    return tmp_path / "work"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    path, places, asked = write(folder / "work", folder)
    assert asked == list(TENSORS)
    assert list((folder / "work").iterdir()) == []
    content = path.read_bytes()
    for name, (begin, size) in places.items():
        assert begin % ALIGNMENT == 0
        assert content[begin : begin + size] == TENSORS[name]
    return content, places


KILLED = """
import os, signal, sys
from pathlib import Path
from test_weights_file import write
work = Path(sys.argv[1])
write(work, work.parent, stop_at="blocks.17", how=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_process_is_gone_on_from(tmp_path, wanted, caplog):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)])
    work = tmp_path / "work"
    killed = subprocess.run([sys.executable, "-c", KILLED, work], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert killed.returncode == -signal.SIGKILL
    path, places, asked = write(work, tmp_path)
    assert (path.read_bytes(), places) == wanted
    assert asked == list(TENSORS)[17:]
    assert "continues: 132.48 kB of 193.82 kB of weights are there" in caplog.text


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda work: cut(work / "weights.part", 3000), 16),  # torn in the midst of the last tensor
        (lambda work: cut(work / "weights.part", -3), 17),
        (lambda work: cut(work / "weights.notes", 1), 16),
        (lambda work: cut(work / "weights.notes", 40), 16),
        (lambda work: flip(work / "weights.part", 9 * ALIGNMENT), 5),
        (lambda work: (work / "weights.part").unlink(), 0),
        (lambda work: (work / "weights.notes").unlink(), 0),
        (lambda work: (work / "weights.notes").write_bytes(b"\xff\n{}"), 0),
    ],
    ids=["short", "long", "note torn", "note cut", "altered", "no file", "no notes", "no notes of ours"],
)
def test_what_is_not_whole_is_written_again(interrupted, tmp_path, wanted, damage, kept):
    damage(interrupted)
    path, places, asked = write(interrupted, tmp_path)
    assert (path.read_bytes(), places) == wanted
    assert asked == list(TENSORS)[kept:]


def cut(path, size):
    os.truncate(path, path.stat().st_size - size)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_weights_of_another_model_or_in_another_order_are_not_taken(interrupted, tmp_path, wanted):
    assert write(interrupted, tmp_path, facts={"weights_sha256": "ab"})[2] == list(TENSORS)
    with pytest.raises(KeyboardInterrupt):
        write(interrupted, tmp_path, stop_at="blocks.17", how=interrupt)
    order = [*list(TENSORS)[:3], *list(TENSORS)[4:], "blocks.3"]
    asked = write(interrupted, tmp_path, {name: TENSORS[name] for name in order})[2]
    assert asked == order[3:]


def test_a_second_interruption_keeps_what_both_wrote(interrupted, tmp_path, wanted):
    with pytest.raises(KeyboardInterrupt):
        write(interrupted, tmp_path, stop_at="blocks.20", how=interrupt)
    path, places, asked = write(interrupted, tmp_path)
    assert (path.read_bytes(), places) == wanted
    assert asked == list(TENSORS)[20:]


def test_a_process_that_was_killed_before_anything_was_whole_is_no_hindrance(interrupted, tmp_path):
    notes = interrupted / "weights.notes"
    header = notes.read_bytes().splitlines(keepends=True)[0]
    notes.write_bytes(header)
    with pytest.raises(KeyboardInterrupt):
        write(interrupted, tmp_path, stop_at="blocks.2", how=interrupt)
    assert notes.read_bytes().startswith(header)
    assert write(interrupted, tmp_path)[2] == list(TENSORS)[2:]


def test_a_full_disk_is_said_and_what_is_there_is_kept(tmp_path, wanted, monkeypatch):
    with (
        full_disk(60_000),
        pytest.raises(OutputError, match=r"File too large. .*place. 58.75 kB of 193.82 kB are kept, and the same"),
    ):
        write(tmp_path / "work", tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10_000))
    with pytest.raises(
        OutputError, match=r"the rest of the weights file takes 135.07 kB of disk, and .*work has 10.00 kB left: make room"
    ):
        write(tmp_path / "work", tmp_path)
    monkeypatch.undo()
    path, places, asked = write(tmp_path / "work", tmp_path)
    assert (path.read_bytes(), places) == wanted
    assert asked == list(TENSORS)[8:]


def test_where_there_was_never_room_nothing_is_left(tmp_path):
    with full_disk(1000), pytest.raises(OutputError, match="cannot write .*work/weights.part: File too large"):
        write(tmp_path / "work", tmp_path)
    assert list((tmp_path / "work").iterdir()) == []
