"""Bundles are made by several at once, replaced where they are links, and left alone by what fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from full_disk import full_disk

from cachec.runtime.bundle import ANY_DEVICE, MANIFEST, Bundle, Manifest, Target
from cachec.runtime.errors import OutputError
from cachec.runtime.files import hash_file
from cachec.runtime.work import LOCK
from cachec.runtime.write import BundleAdder, BundleWriter

TARGET = Target("eager", "1", "linux", ANY_DEVICE, "float32", "8x6", {})


def manifest(writer, maker="a"):
    names = sorted(writer.files)
    return Manifest(
        model={"name": maker, "source": "tests", "weights_sha256": "0" * 64},
        io={"latents": "latents", "timestep": "timestep", "conditions": []},
        method={"name": "reuse"},
        settings={"width": 64, "height": 64, "steps": 4},
        noise="none",
        targets=(TARGET,),
        programs={"default": {"json": names[0], "arrays": names[-1]}},
        files=writer.files,
    )


def build(out, maker, *, force=True):
    """A bundle of a few files that are this maker's own, and one that all makers have."""
    with BundleWriter(out, force=force) as writer:
        writer.add_bytes("engines/shared.onnx", b"the same of all")
        for number in range(4):
            writer.add_bytes(f"programs/{number}.json", f"{maker} {number}".encode())
        writer.commit(manifest(writer, maker))


def names_of(out):
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def assert_whole(out):
    """It opens, and holds what its manifest lists and nothing else."""
    assert names_of(out) == {*Bundle.open(out).manifest.files, MANIFEST}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_two_builders_of_one_bundle_work_apart(tmp_path):
    out = tmp_path / "x.cachec"
    with BundleWriter(out, force=False) as first:
        first.add_bytes("engines/compute.onnx", b"of the first")
        with BundleWriter(out, force=False) as second:
            second.add_bytes("engines/other.onnx", b"of the second")
            assert first.staging != second.staging
            assert all((first.staging / name).exists() for name in first.files)
            second.commit(manifest(second, "second"))
        with pytest.raises(OutputError, match="is a bundle already: pass --force"):
            first.commit(manifest(first, "first"))
    assert Bundle.open(out).manifest.model["name"] == "second"
    assert_whole(out)


def test_what_was_hashed_while_it_was_written_is_not_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cachec.runtime.checked_files.LARGE_FILE_BYTES", 64)
    hashed = []
    for module in ("write", "checked_files"):
        monkeypatch.setattr(f"cachec.runtime.{module}.hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    with BundleWriter(tmp_path / "x.cachec", force=False) as writer:
        weights = writer.directory("engines") / "weights.bin"
        weights.write_bytes(content := bytes(65))
        name = writer.seal(weights, hashlib.sha256(content).hexdigest())
        writer.add_bytes("programs/small.json", b"")
        writer.commit(manifest(writer))
    assert name == f"engines/weights-{hashlib.sha256(content).hexdigest()[:16]}.bin"
    assert hashed == ["small.json"]
    Bundle.open(tmp_path / "x.cachec")
    assert hashed == ["small.json", Path(only(writer.files, "programs")).name]
    Bundle.open(tmp_path / "x.cachec", verify=True)
    assert len(hashed) == 4


def only(names, start):
    (name,) = [name for name in names if name.startswith(start)]
    return name


def test_builds_that_replace_each_other_leave_one_whole_bundle(tmp_path):
    out = tmp_path / "x.cachec"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda maker: build(out, maker), map(str, range(24))))
    assert_whole(out)


COMMIT = """
import sys
from pathlib import Path
from test_write import build
for number in range(8):
    build(Path(sys.argv[1]), f"{sys.argv[2]} {number}")
"""


def test_so_do_builds_of_other_processes(tmp_path):
    out, paths = tmp_path / "x.cachec", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", COMMIT, out]
    others = [subprocess.Popen([*command, str(n)], env={**os.environ, "PYTHONPATH": paths}) for n in range(2)]
    assert [other.wait(60) for other in others] == [0, 0]
    assert_whole(out)


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from cachec.runtime import write
from test_write import build
def interrupt(*arguments):
    os.kill(os.getpid(), int(sys.argv[2]))
    raise AssertionError("the signal came late")
real = write.write_file
write.write_file = interrupt  # the manifest, which is written last
build(Path(sys.argv[1]), "interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_commit_leaves_the_old_bundle(tmp_path, number):
    out, paths = tmp_path / "x.cachec", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    build(out, "old")
    command = [sys.executable, "-c", INTERRUPTED, out, str(int(number))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == -number, done.stderr
    assert Bundle.open(out).manifest.model["name"] == "old"
    if number == signal.SIGINT:
        assert_whole(out)
    build(out, "new")
    assert Bundle.open(out).manifest.model["name"] == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_leaves_the_old_bundle_and_says_so(tmp_path):
    out = tmp_path / "x.cachec"
    build(out, "old")
    too_large = pytest.raises(OutputError, match=rf"cannot write {tmp_path}/.*File too large\. Make room there")
    with BundleWriter(out, force=True) as writer, full_disk(), too_large:
        writer.add_bytes("engines/large.onnx", b"x" * 2000)
    with BundleWriter(out, force=True) as writer:
        for number in range(9):
            writer.add_bytes(f"programs/{number}.json", b"small")
        with full_disk(), too_large:  # of the manifest
            writer.commit(manifest(writer, "new"))
    assert Bundle.open(out).manifest.model["name"] == "old"
    assert_whole(out)


def as_links(out, blobs):
    """The bundle ``out`` becomes one of links into ``blobs``."""
    blobs.mkdir()
    for file in [path for path in out.rglob("*") if path.is_file()]:
        blob = blobs / hash_file(file)
        shutil.move(file, blob)
        file.symlink_to(blob)
    return {blob.name: blob.read_bytes() for blob in blobs.iterdir()}


def test_a_bundle_of_links_is_replaced_without_touching_what_they_point_to(tmp_path):
    out, blobs = tmp_path / "there" / "x.cachec", tmp_path / "blobs"
    build(out, "old")
    before = as_links(out, blobs)
    build(out, "new")
    assert {blob.name: blob.read_bytes() for blob in blobs.iterdir()} == before
    assert_whole(out)
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_adding_to_a_bundle_of_links_touches_no_blob(tmp_path):
    out, blobs = tmp_path / "there" / "x.cachec", tmp_path / "blobs"
    build(out, "old")
    before = as_links(out, blobs)
    with BundleAdder(out) as adder:
        name = adder.add_bytes("engines/added.plan", b"new")
        adder.commit(manifest(adder, "old"))
    assert (out / name).read_bytes() == b"new"
    assert {blob.name: blob.read_bytes() for blob in blobs.iterdir()} == before
    assert_whole(out)


def test_adding_removes_what_is_replaced(tmp_path):
    """What the new manifest does not list, and what a killed process moved in; nothing of anybody else."""
    out = tmp_path / "x.cachec"
    build(out, "old")
    (out / "engines" / "lost.plan").write_bytes(b"moved in, never listed")
    (out / "notes.txt").write_text("mine")
    with BundleAdder(out) as adder:
        old = {name for name in adder.files if name.startswith(("engines/shared", "programs/1"))}
        stay = adder.files.keys() - old
        for name in old:
            del adder.files[name]
        name = adder.add_bytes("engines/added.plan", b"new")
        adder.commit(manifest(adder, "old"))
    assert (len(old), len(stay)) == (2, 3)
    assert names_of(out) == {*stay, name, MANIFEST, "notes.txt"}


def test_what_a_killed_process_collected_is_not_added(tmp_path):
    out = tmp_path / "x.cachec"
    build(out, "old")
    left = out / ".adding" / "engines"
    left.mkdir(parents=True)
    (left / "lost.plan").write_bytes(b"half of it")
    (left.parent / "lost").write_bytes(b"half of it")
    with BundleAdder(out) as adder:
        assert [path.name for path in adder.staging.iterdir()] == [LOCK]
        folder = adder.directory("engines/deep/deeper")
        assert adder.directory("engines/deep/deeper") == folder
        (folder / "a.plan").write_bytes(b"new")
        digest = hash_file(folder / "a.plan")
        name = adder.seal(folder / "a.plan")
        assert name == f"engines/deep/deeper/a-{digest[:16]}.plan"
        assert adder.files[name] == {"bytes": 3, "sha256": digest}
        assert adder.seal(adder.staging / name) == name  # named by its hash already


def test_what_may_not_be_replaced_is_said_before_anything_is_made(tmp_path):
    out = tmp_path / "x.cachec"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="is a file: choose another place"):
        BundleWriter(out, force=True)
    out.unlink()
    build(out, "old")
    with pytest.raises(OutputError, match="is a bundle already: pass --force"):
        BundleWriter(out, force=False)
    (out / MANIFEST).unlink()
    with pytest.raises(OutputError, match="holds an interrupted build: pass --force"):
        BundleWriter(out, force=False)
    (out / "notes.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match="is a directory with other things in it"):
        BundleWriter(out, force=True)
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", "new", force=False)


def test_a_folder_of_a_bundle_that_is_a_link_is_left_alone(tmp_path):
    out, elsewhere = tmp_path / "x.cachec", tmp_path / "elsewhere"
    build(out, "old")
    shutil.move(out / "engines", elsewhere)
    (out / "engines").symlink_to(elsewhere)
    before = names_of(elsewhere)
    Bundle.open(out)
    with pytest.raises(OutputError, match="engines is a link to .*elsewhere, which is left alone"):
        build(out, "new")
    assert names_of(elsewhere) == before
    assert Bundle.open(out).manifest.model["name"] == "old"


def test_a_bundle_under_another_name_is_the_same_place(tmp_path):
    build(tmp_path / "x.cachec", "old")
    (tmp_path / "link").symlink_to("x.cachec")
    build(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "x.cachec").manifest.model["name"] == "new"


def test_files_of_others_in_a_bundle_stay(tmp_path):
    """A manifest that names files elsewhere removes none of them."""
    out = tmp_path / "x.cachec"
    build(out, "old")
    (tmp_path / "mine").write_text("years of work")
    data = json.loads((out / MANIFEST).read_text())
    data["files"] |= {"../mine": {}, str(tmp_path / "mine"): {}}
    (out / MANIFEST).write_text(json.dumps(data))
    build(out, "new")
    assert (tmp_path / "mine").read_text() == "years of work"


def test_only_one_adds_to_a_bundle_and_a_build_may_replace_it(tmp_path):
    out = tmp_path / "x.cachec"
    build(out, "old")
    with BundleAdder(out) as adder:
        with (
            pytest.raises(OutputError, match="another process is adding to .*: wait until it is done"),
            BundleAdder(out),
        ):
            pass
        build(out, "new")
        adder.add_bytes("engines/added.plan", b"new")
        with pytest.raises(OutputError, match="was replaced meanwhile"):
            adder.commit(manifest(adder, "old"))
    assert Bundle.open(out).manifest.model["name"] == "new"
    assert_whole(out)


def test_a_lock_that_a_killed_process_left_is_in_nobodys_way(tmp_path):
    out = tmp_path / "x.cachec"
    out.mkdir()
    (out / LOCK).write_bytes(b"")
    build(out, "new", force=False)
    assert_whole(out)
