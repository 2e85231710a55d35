"""Files: written whole or not at all, with the reason if they cannot be; read however an editor saved them."""

import os
import tempfile
from pathlib import Path

import pytest
from full_disk import full_disk

from cachec.runtime.errors import InputError, OutputError
from cachec.runtime.files import cache_folder, check_file, hash_file, read_text_file, temporary_folder, write_file, writing


def test_a_file_is_written_with_its_directory(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_content_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_file(path, "text is not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_interrupts_when_the_file_is_in_place_is_heard(tmp_path, monkeypatch):
    def replace(*places, real=os.replace):
        real(*places)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "blob").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_what_cannot_be_written_is_one_line_with_place_and_reason(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        OutputError, match=r"^cannot write .*/file/below: .*/file: File exists\. Make room there, or choose another"
    ):
        write_file(tmp_path / "file" / "below", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*/folder: Is a directory"):
        write_file(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OutputError, match=rf"^cannot write {path}: File too large\. Make room there, or choose"):
        write_file(path, b"x" * 2000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_library_raises_for_a_full_disk_is_named_too(tmp_path):
    with (
        pytest.raises(OutputError, match=r"cannot write .*/x: unexpected pos 64\. Make room"),
        writing(tmp_path / "x", RuntimeError),
    ):
        raise RuntimeError("unexpected\n  pos 64")
    with pytest.raises(ValueError, match="mine"), writing(tmp_path / "x", RuntimeError):
        raise ValueError("mine")


def test_a_temporary_folder_goes_and_needs_a_place(monkeypatch, tmp_path):
    with temporary_folder() as folder:
        (folder / "file").write_bytes(b"")
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="name another with TMPDIR"), temporary_folder():
        pass


def test_a_place_is_checked_before_anything_slow(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    check_file(tmp_path / "new" / "deep" / "x.png", force=False)
    check_file(tmp_path / "file", force=True)
    for path, message in (
        (tmp_path, "is a directory: name a file in it"),
        (Path("/dev/null"), "is a device or a pipe, which would be replaced: name a file"),
        (tmp_path / "file", "exists already: pass --force"),
        (tmp_path / "lost", "exists already: pass --force"),
        (tmp_path / "file" / "x.png", "cannot write .*: .*/file is a file. Choose another place"),
    ):
        with pytest.raises(OutputError, match=message):
            check_file(path, force=False)


@pytest.mark.parametrize(
    "content",
    [
        "a café\nein Bär\n".encode(),
        "a café\r\nein Bär\r\n".encode(),
        "a café\rein Bär\r".encode(),
        "a café\nein Bär\n".encode("utf-8-sig"),
        "a café\r\nein Bär\r\n".encode("utf-8-sig"),
    ],
    ids=["Unix", "Windows", "old Mac", "byte order mark", "Windows, byte order mark"],
)
def test_text_is_read_however_it_was_saved(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    assert read_text_file(tmp_path / "t", "list") == "a café\nein Bär\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a house\na café\n".encode("latin-1"), r"list .*/t is not UTF-8: line 2 has a byte 0xe9\. Save it as UTF-8"),
        ("a café".encode("utf-16"), "is saved as UTF-16: save it as UTF-8"),
        ("a café".encode("utf-32"), "is saved as UTF-32: save it as UTF-8"),
        ("a house\na tree".encode("utf-16-le"), "is no text: line 1 has a zero byte, as UTF-16 has"),
        (b"a house\n\na\0tree\n", "is no text: line 3 has a zero byte"),
    ],
    ids=["latin-1", "utf-16", "utf-32", "utf-16 without mark", "zero"],
)
def test_another_encoding_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text_file(tmp_path / "t", "list")


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(InputError, match="list .*/none cannot be read: No such file or directory"):
        read_text_file(tmp_path / "none", "list")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_text_file(tmp_path, "list")


def test_a_place_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or mode != os.W_OK)
    with pytest.raises(OutputError, match="cannot write .*/x: .* may not be written. Choose another place"):
        check_file(tmp_path / "x", force=False)


def test_notes_of_this_machine_are_in_its_cache(monkeypatch):
    for name in ("CACHEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/cachec")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/cachec")
    monkeypatch.setenv("CACHEC_CACHE", "~/notes")
    assert cache_folder() == Path("/home/me/notes")


def test_hash_file_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file").startswith("ba7816bf8f01cfea")


def test_files_are_readable_by_others(tmp_path):
    write_file(tmp_path / "file", b"")
    assert os.stat(tmp_path / "file").st_mode & 0o777 == 0o644
