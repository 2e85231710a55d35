"""Folders with one owner at a time: nobody shares or removes what another works in."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachec.runtime import work
from cachec.runtime.errors import InputError, OutputError
from cachec.runtime.work import LOCK, STALE_SECONDS, claim_work, fresh_folder, holding, remove_work

FACTS = {"steps": "4"}


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request, monkeypatch):
    """On this disk, and on one that has no locks."""
    if not request.param:
        monkeypatch.setattr(work, "_lock", lambda descriptor: None)
    return request.param


def age(folder):
    """Let nothing in ``folder`` have changed for a day."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - STALE_SECONDS - 9,) * 2)


def test_two_of_one_process_have_folders_of_their_own(tmp_path, locks):
    with fresh_folder(tmp_path, ".x-") as first:
        (first / "file").write_bytes(b"of the first")
        with fresh_folder(tmp_path, ".x-") as second:
            assert first != second
            assert (first / "file").read_bytes() == b"of the first"
        assert (first / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_with_the_next(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom cachec.runtime.work import fresh_folder\n"
        "with fresh_folder(Path(sys.argv[1]), '.x-') as folder:\n"
        "    (folder / 'file').write_bytes(b'')\n"
        "    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".y-other").mkdir()
    with fresh_folder(tmp_path, ".x-"):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".y-other"]


def test_a_folder_that_says_nothing_about_its_owner_goes_only_when_it_is_old(tmp_path):
    foreign = tmp_path / ".x-4194399"
    foreign.mkdir()
    (foreign / "weights.part").write_bytes(b"being written")
    with fresh_folder(tmp_path, ".x-"):
        assert foreign.exists()
    age(foreign)
    with fresh_folder(tmp_path, ".x-"):
        assert not foreign.exists()


def test_without_locks_a_folder_that_changed_lately_is_somebodys(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_lock", lambda descriptor: None)
    left = tmp_path / ".x-left"
    left.mkdir()
    (left / LOCK).write_bytes(b"")
    with fresh_folder(tmp_path, ".x-"):
        assert left.exists()
    age(left)
    with fresh_folder(tmp_path, ".x-"):
        assert not left.exists()


def test_the_folder_of_another_user_is_left_alone(tmp_path, monkeypatch):
    foreign = tmp_path / ".x-foreign"
    foreign.mkdir()
    (foreign / LOCK).write_bytes(b"")
    real = os.open

    def refused(path, flags, mode=0o777):
        if foreign in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(work.os, "open", refused)
    with fresh_folder(tmp_path, ".x-") as mine:
        assert mine.exists()
    assert foreign.exists()


def test_work_has_one_owner_and_goes_on_after_it(tmp_path, locks):
    path = tmp_path / "out.training"
    with claim_work(path, "training", FACTS):
        (path / "part").write_bytes(b"1")
        busy = pytest.raises(OutputError, match="another process works on this training, in .*: wait until it is done")
        with busy, claim_work(path, "training", FACTS):
            pass
        remove_work(path)
        assert (path / "part").exists()
    with claim_work(path, "training", FACTS):
        assert (path / "part").read_bytes() == b"1"
    remove_work(path)
    remove_work(path)
    assert list(tmp_path.iterdir()) == []


def test_work_with_other_facts_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "out.training"
    with claim_work(path, "training", FACTS):
        pass
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    refused = pytest.raises(InputError, match="holds an unfinished training with other settings: finish it, or remove")
    with refused, claim_work(path, "training", {"steps": "5"}):
        pass
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_facts_that_cannot_be_read_are_other_facts(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "training.json").write_bytes(b'{"steps"')
    with pytest.raises(InputError, match="with other settings"), claim_work(tmp_path / "w", "training", FACTS):
        pass


def test_an_empty_work_folder_goes(tmp_path):
    with claim_work(tmp_path / "w", "compilation"):
        assert (tmp_path / "w").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_work_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write .*: Not a directory"), claim_work(tmp_path / "file" / "w", "x"):
        pass
    with pytest.raises(OutputError, match="cannot write .*: File exists"), fresh_folder(tmp_path / "file", ".x-"):
        pass


def test_one_at_a_time_holds_a_lock(tmp_path, locks, monkeypatch):
    monkeypatch.setattr(work.time, "sleep", lambda seconds, real=time.sleep: real(0.0005))
    counter = [0]

    def add(_):
        with holding(tmp_path / LOCK, "busy", wait=True):
            value = counter[0]
            time.sleep(0)
            counter[0] = value + 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(40)))
    assert counter == [40]
    assert list(tmp_path.iterdir()) == []


def test_who_waits_too_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "WAIT_SECONDS", 0.05)
    with holding(tmp_path / LOCK, "busy"):
        told = pytest.raises(OutputError, match=r"^busy: wait until it is done. If none is, remove .*\.lock")
        with told, holding(tmp_path / LOCK, "busy", wait=True):
            pass


def test_locks_that_fail_are_said(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OutputError, match="cannot write .*: Input/output error"), holding(tmp_path / LOCK, "busy"):
        pass


def test_a_disk_without_locks_is_told_by_what_it_answers(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with holding(tmp_path / LOCK, "busy"):
        told = pytest.raises(OutputError, match="busy")
        with told, holding(tmp_path / LOCK, "busy"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        left = tmp_path / ".x-left"
        left.mkdir()
        (left / LOCK).write_bytes(b"")
        told = pytest.raises(OutputError, match="busy")
        with fresh_folder(tmp_path, ".x-"), holding(tmp_path / LOCK, "busy"), told, holding(tmp_path / LOCK, "busy"):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
