"""Bundles from elsewhere: the Hub, which a server on this machine stands in for, and tars."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from full_disk import full_disk

from cachec.engines import open_bundle
from cachec.engines.places import find_bundle, pack
from cachec.runtime.bundle import MANIFEST, Bundle
from cachec.runtime.errors import BundleError, InputError, OutputError
from tests.hub_stand_in import asking, hub_on_loopback


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEC_CACHE", str(tmp_path / "cache"))


def cachec(address, home, *arguments):
    """The command line in a process that may ask the Hub at ``address``."""
    command = [sys.executable, "-m", "cachec", *map(str, arguments)]
    return subprocess.run(command, env=asking(address, home), capture_output=True, text=True, check=False)


def listed(bundle):
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_a_bundle_goes_to_the_hub_and_comes_back(toy_bundle, tmp_path):
    with hub_on_loopback() as (hub, address):
        pushed = cachec(address, tmp_path / "hf", "push", toy_bundle, "somebody/toy")
        assert pushed.returncode == 0, pushed.stderr
        assert f"{address}/somebody/toy" in pushed.stdout
        assert hub.commits == 1
        assert hub.files["somebody/toy"].keys() == {MANIFEST, *Bundle.open(toy_bundle).manifest.files}
        pulled = cachec(address, tmp_path / "hf", "pull", "somebody/toy", "-o", tmp_path / "here")
        assert pulled.returncode == 0, pulled.stderr
        assert Bundle.open(tmp_path / "here").manifest == Bundle.open(toy_bundle).manifest
        shown = cachec(address, tmp_path / "hf", "pull", "somebody/toy")
        assert Bundle.open(tmp_path / "hf" / shown.stdout.split("hf/", 1)[1].strip()).manifest.model["name"] == "toy"
        missing = cachec(address, tmp_path / "hf", "pull", "somebody/else")
        assert missing.returncode == BundleError.exit_code
        assert "somebody/else" in missing.stderr


def test_a_name_that_is_none_is_refused_before_anything_is_asked(toy_bundle, tmp_path):
    refused = cachec("http://127.0.0.1:9", tmp_path, "push", toy_bundle, "no name")
    assert refused.returncode == InputError.exit_code
    assert "give owner/name" in refused.stderr


def test_a_tar_is_the_oci_image_layout_and_opens_as_the_bundle_does(toy_bundle, tmp_path):
    path = pack(toy_bundle, tmp_path / "toy.tar")
    with tarfile.open(path) as tar:
        index = json.load(tar.extractfile("index.json"))
        assert json.load(tar.extractfile("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
        blobs = {name.rpartition("/")[2]: tar.extractfile(name).read() for name in tar.getnames() if name.startswith("blobs/")}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in blobs.items())
    manifest = json.loads(blobs[index["manifests"][0]["digest"].partition(":")[2]])
    assert {layer["digest"].partition(":")[2] for layer in manifest["layers"]} <= blobs.keys()
    place = find_bundle(path)
    files = [MANIFEST, *Bundle.open(toy_bundle).manifest.files]
    assert listed(place).keys() == set(files)
    assert find_bundle(path) == place
    with open_bundle(path) as loaded:
        assert loaded.manifest.model["name"] == "toy"
    with pytest.raises(OutputError, match="exists already"):
        pack(toy_bundle, path)


def rewritten(path, out, change):
    """A tar whose members went through ``change(name, content)``, which gives the new name and content."""
    with tarfile.open(path) as old, tarfile.open(out, "w") as new:
        for name in old.getnames():
            called, content = change(name, old.extractfile(name).read())
            entry = tarfile.TarInfo(called)
            entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
    return out


def leave(name, content):
    """Let a layer leave the bundle, with digests that are right."""
    if b'"layers"' in content:
        content = content.replace(b'"manifest.json"', b'"../manifest.json"')
        return f"blobs/sha256/{hashlib.sha256(content).hexdigest()}", content
    return name, content


def test_damaged_and_unsafe_tars_are_refused(toy_bundle, tmp_path):
    path = pack(toy_bundle, tmp_path / "toy.tar")
    program = Bundle.open(toy_bundle).manifest.programs["default"]["json"]
    digest = Bundle.open(toy_bundle).manifest.files[program]["sha256"]
    damaged = rewritten(path, tmp_path / "a.tar", lambda name, old: (name, old[::-1] if digest in name else old))
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        find_bundle(damaged)
    assert not [one for one in (tmp_path / "cache" / "bundles").iterdir() if not one.name.startswith(".")]
    with tarfile.open(path) as tar:
        old = next(name for name in tar.getnames() if b'"layers"' in tar.extractfile(name).read())
        new = leave(old, tar.extractfile(old).read())[0].rpartition("/")[2]

    def unsafe(name, content):
        if name == "index.json":
            return name, content.replace(old.rpartition("/")[2].encode(), new.encode())
        return leave(name, content)

    with pytest.raises(BundleError, match="leaves the bundle"):
        find_bundle(rewritten(path, tmp_path / "b.tar", unsafe))
    assert not (tmp_path / "cache" / MANIFEST).exists()
    with pytest.raises(BundleError, match="is no bundle as cachec pack writes it"):
        find_bundle(rewritten(path, tmp_path / "c.tar", lambda name, old: (name, b"{}" if name == "index.json" else old)))


def test_what_is_no_tar_of_ours_is_refused_and_a_mistyped_directory_is_not_asked_for(toy_bundle, tmp_path):
    path = pack(toy_bundle, tmp_path / "toy.tar")
    for name, content in (("cut.tar.gz", gzip.compress(path.read_bytes())[:60]), ("picture.png", b"no tar")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name} is no bundle as cachec pack writes it"):
            find_bundle(tmp_path / name)
    for mistyped in ("./to.cachec", "../to.cachec"):
        assert find_bundle(mistyped) == Path(mistyped)


def test_a_full_disk_under_a_tar_leaves_no_half_copy(toy_bundle, tmp_path):
    with full_disk(), pytest.raises(OutputError, match=r"toy\.tar: File too large\. Make room there, or choose"):
        pack(toy_bundle, tmp_path / "toy.tar")
    assert not list(tmp_path.iterdir())
    path = pack(toy_bundle, tmp_path / "toy.tar")
    with full_disk(), pytest.raises(OutputError, match=r"File too large\. Make room there, or choose"):
        find_bundle(path)
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    assert Bundle.open(find_bundle(path)).manifest == Bundle.open(toy_bundle).manifest


def test_a_full_disk_under_a_pull_leaves_no_bundle(toy_bundle, tmp_path):
    with hub_on_loopback() as (_, address):
        assert cachec(address, tmp_path / "hf", "push", toy_bundle, "somebody/toy").returncode == 0
        with full_disk():
            pulled = cachec(address, tmp_path / "hf", "pull", "somebody/toy", "-o", tmp_path / "here")
        assert pulled.returncode == OutputError.exit_code, pulled.stderr
        assert f"cannot write {tmp_path / 'here'}: File too large. Make room there, or choose" in pulled.stderr
        assert not (tmp_path / "here").exists()
        again = cachec(address, tmp_path / "hf", "pull", "somebody/toy", "-o", tmp_path / "here")
        assert again.returncode == 0, again.stderr
        assert Bundle.open(tmp_path / "here").manifest == Bundle.open(toy_bundle).manifest
        assert not list(tmp_path.glob(".here*"))


def test_a_full_disk_under_a_pull_into_the_cache_names_the_cache(toy_bundle, tmp_path):
    with hub_on_loopback() as (_, address):
        assert cachec(address, tmp_path / "hf", "push", toy_bundle, "somebody/toy").returncode == 0
        with full_disk():
            pulled = cachec(address, tmp_path / "hf", "pull", "somebody/toy")
        assert pulled.returncode == OutputError.exit_code, pulled.stderr
        place = f"cannot write {tmp_path / 'hf' / 'hub'}: File too large. Make room there, or let HF_HOME name another place"
        assert place in pulled.stderr
        assert cachec(address, tmp_path / "hf", "pull", "somebody/toy").returncode == 0


def test_a_pulled_bundle_that_is_refused_is_not_kept(toy_bundle, tmp_path):
    with hub_on_loopback() as (hub, address):
        assert cachec(address, tmp_path / "hf", "push", toy_bundle, "somebody/toy").returncode == 0
        whole, cut = hub.files["somebody/toy"], dict(hub.files["somebody/toy"])
        cut[Bundle.open(toy_bundle).manifest.programs["default"]["json"]] = b"{}"
        hub.files["somebody/toy"] = cut
        refused = cachec(address, tmp_path / "hf", "pull", "somebody/toy", "-o", tmp_path / "here")
        assert refused.returncode == BundleError.exit_code, refused.stderr
        assert not [one for one in tmp_path.iterdir() if "here" in one.name]
        hub.files["somebody/toy"] = whole
        again = cachec(address, tmp_path / "hf", "pull", "somebody/toy", "-o", tmp_path / "here")
        assert again.returncode == 0, again.stderr
        assert Bundle.open(tmp_path / "here").manifest == Bundle.open(toy_bundle).manifest
