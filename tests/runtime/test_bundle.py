import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from damage import change
from toy_bundle import SCHEDULE, STEPS

import cachec
from cachec.runtime import checked_files
from cachec.runtime.bundle import ANY_DEVICE, MANIFEST, Bundle, Manifest, Target, _digest
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.files import hash_file
from cachec.runtime.program import Program

KINDS = [
    "manifest.json",
    "compute*.pt2",
    "prologue*.pt2",
    "forecast*.pt2",
    "advance*.pt2",
    "default*.json",
    "default*.safetensors",
    "uncached*.json",
    "uncached*.safetensors",
]


@pytest.fixture
def bundle(toy_bundle, tmp_path):
    return shutil.copytree(toy_bundle, tmp_path / "copy.cachec")


def only(bundle, pattern):
    (path,) = bundle.rglob(pattern)
    return path


def rewrite_manifest(bundle, **changes):
    """Change the manifest as an attacker would: with a digest that fits."""
    manifest = replace(Bundle.open(bundle).manifest, **changes)
    (bundle / MANIFEST).write_text(json.dumps(manifest.to_json()))


def list_file_as(bundle, name):
    """Let the manifest list a program file under another name."""
    manifest = Bundle.open(bundle).manifest
    old = manifest.programs["default"]["arrays"]
    files = {name if key == old else key: entry for key, entry in manifest.files.items()}
    rewrite_manifest(bundle, files=files)
    return bundle / old


def test_an_undamaged_copy_opens(bundle):
    opened = Bundle.open(bundle, verify=True)
    assert opened.program().compute_steps == SCHEDULE.compute
    assert opened.program().num_steps == STEPS
    assert set(opened.target.engines) == {"prologue", "compute", "forecast", "advance"}


def test_the_manifest_lists_every_file_and_nothing_else(bundle):
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found == {*Bundle.open(bundle).manifest.files, MANIFEST}


def test_the_test_damages_every_file(bundle):
    damaged = {path for kind in KINDS for path in bundle.rglob(kind)}
    assert damaged == {path for path in bundle.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(bundle, kind, keep):
    path = only(bundle, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(BundleError, match=f"{path.name}.*(bytes|does not read as a manifest)"):
        Bundle.open(bundle)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_byte_is_refused(bundle, kind, place):
    path = only(bundle, kind)
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * place)] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{path.name} does not match its SHA-256"):
        Bundle.open(bundle)


@pytest.mark.parametrize(("bit", "stride"), [(1, 61), (0x80, 83)])
def test_any_flipped_byte_of_the_manifest_is_refused(bundle, bit, stride):
    path = bundle / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), stride):
        damaged = bytearray(content)
        damaged[place] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match="manifest|bundle format"):
            Bundle.open(bundle)


def test_a_manifest_that_was_damaged_anyhow_opens_or_is_refused_in_short(bundle):
    """300 changes; most with a digest that fits, as whoever means harm would write it."""
    path, random = bundle / MANIFEST, Random(0)
    original = path.read_text()
    said = []
    for _ in range(300):
        data = json.loads(original)
        for _ in range(random.choice([1, 1, 1, 3])):
            change(data, random)
        if random.random() < 0.8 and isinstance(data, dict):
            data["digest"] = _digest({k: v for k, v in data.items() if k != "digest"})
        text = json.dumps(data)
        path.write_text(text if random.random() < 0.95 else text[: random.randrange(len(text))])
        try:
            Bundle.open(bundle).program()
        except (BundleError, InputError) as error:
            said.append(str(error).replace(str(bundle), "x"))
    assert 100 < len(said) < 280
    assert max(map(len, said)) < 500


def test_a_deeply_nested_manifest_is_refused(bundle):
    (bundle / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="does not read as a manifest"):
        Bundle.open(bundle)


def test_a_wrong_type_is_named_with_its_place(bundle):
    target = Bundle.open(bundle).target
    rewrite_manifest(bundle, targets=(target, replace(target, backend=["ort"])))
    with pytest.raises(
        BundleError, match=r"the manifest\.targets\[1\]\.backend is \['ort'\], expected text: compile the bundle"
    ):
        Bundle.open(bundle)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_missing_file_is_named(bundle, kind):
    path = only(bundle, kind)
    path.unlink()
    with pytest.raises(BundleError, match=f"{path.name} is missing"):
        Bundle.open(bundle)


def test_a_directory_without_a_manifest_is_no_bundle(bundle):
    (bundle / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(bundle)


def test_a_path_that_does_not_exist_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="there is no bundle at"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "does not read as a manifest"),
        ("", "does not read as a manifest"),
        ("[]", "is not a JSON object"),
        ("{}", "is not the manifest of a cachec bundle"),
        ('{"format": "other"}', "is not the manifest of a cachec bundle"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle, text, message):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize("version", [1, 3, 0, "2", None])
def test_another_format_version_is_refused_with_what_to_do(bundle, version):
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, "format_version": version}))
    with pytest.raises(BundleError, match=f"bundle format {version!r} .*install the cachec that wrote it"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../outside", "programs/../../outside", "/etc/hostname", "..\\outside", "C:/outside"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle, name):
    inside = list_file_as(bundle, name)
    shutil.copy(inside, bundle.parent / "outside")
    with pytest.raises(BundleError, match="leaves the bundle: do not trust"):
        Bundle.open(bundle)


def as_in_the_hubs_cache(bundle):
    """The same bundle as the Hub's client lays it out: every file a link into a store of blobs."""
    root = bundle.parent / "models--me--toy"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        link, blob = snapshot / file.relative_to(bundle), blobs / hash_file(file)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot, blobs


def test_a_bundle_in_the_hubs_cache_opens_and_runs(bundle):
    snapshot, _ = as_in_the_hubs_cache(bundle)
    conditions = {"prompt": np.ones((1, 8), np.float32)}
    with cachec.load(snapshot) as linked, cachec.load(bundle) as plain:
        np.testing.assert_array_equal(linked.denoise(conditions, seeds=[0]), plain.denoise(conditions, seeds=[0]))


def test_a_damaged_blob_behind_a_link_is_refused(bundle):
    snapshot, _ = as_in_the_hubs_cache(bundle)
    only(snapshot, "default*.safetensors").resolve().write_bytes(b"something else")
    with pytest.raises(BundleError, match="the copy is incomplete"):
        Bundle.open(snapshot)


def test_the_hash_of_another_blob_is_not_taken_for_that_of_a_link(bundle, tmp_path, monkeypatch):
    """A link that is set to another file of the same size and time is looked at anew."""
    monkeypatch.setenv("CACHEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cachec.runtime.checked_files.LARGE_FILE_BYTES", 0)
    snapshot, blobs = as_in_the_hubs_cache(bundle)
    Bundle.open(snapshot)
    link = only(snapshot, "compute*.pt2")
    content, times = bytearray(link.read_bytes()), link.stat()
    content[100] ^= 1
    other = blobs / "other"
    other.write_bytes(content)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        Bundle.open(snapshot)


def test_a_file_that_is_used_but_not_listed_is_refused(bundle):
    opened = Bundle.open(bundle)
    arrays = opened.manifest.programs["default"]["arrays"]
    rewrite_manifest(bundle, files={k: v for k, v in opened.manifest.files.items() if k != arrays})
    with pytest.raises(BundleError, match="not listed with a hash"):
        Bundle.open(bundle).program()


@pytest.mark.parametrize(
    ("field", "value"),
    [("files", []), ("files", {MANIFEST: {}}), ("programs", {"default": {}}), ("targets", ())],
    ids=["files is a list", "no size and hash", "no program files", "no targets"],
)
def test_a_manifest_of_the_wrong_form_is_refused(bundle, field, value):
    rewrite_manifest(bundle, **{field: value})
    with pytest.raises(BundleError):
        cachec.load(bundle)


TOKENS = {"tokenizer": "t", "file": "f", "ids": "i", "mask": "m", "length": 8, "pad": 0, "before": "", "after": "",
          "special": True, "cleaning": [], "tells": None, "told_length": 0, "blank": False}  # fmt: skip
PICTURES = {"texts": {"8": {"tokens": [TOKENS], "graphs": {}}}, "embedded": {}, "scale": "guidance", "decoder": "d"}
SCALES = {"guidance": 3.5, "true_cfg_scale": 1, "text_tokens": 8}


@pytest.mark.parametrize(
    ("pictures", "settings", "said"),
    [
        (PICTURES, SCALES | {"true_cfg_scale": {}}, "settings.true_cfg_scale is {}, expected a number"),
        (PICTURES, {"guidance": 3.5, "true_cfg_scale": 1}, "settings lacks 'text_tokens'"),
        (PICTURES, SCALES | {"frames": "2"}, "settings.frames is '2', expected a whole number"),
        (PICTURES | {"encoder": 10**40}, SCALES, "pictures.encoder is 1000"),
        (
            PICTURES | {"texts": {"8": {"tokens": [{**TOKENS, "tells": 3}], "graphs": {}}}},
            SCALES,
            "tells is 3, expected text or",
        ),
    ],
    ids=["no scale", "no length", "no frames", "no name", "whose loss"],
)
def test_settings_and_texts_of_a_bundle_that_makes_pictures_are_looked_at_when_it_is_opened(bundle, pictures, settings, said):
    rest = {k: v for k, v in Bundle.open(bundle).manifest.settings.items() if k not in SCALES}
    rewrite_manifest(bundle, pictures=PICTURES, settings=rest | SCALES)
    Bundle.open(bundle)
    rewrite_manifest(bundle, pictures=pictures, settings=rest | settings)
    with pytest.raises(BundleError, match=re.escape(said)):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("shape", 0), 2.0, "expected a whole number or text"),
        (("shape", 0), "bath", "of size 'bath', which is none of batch"),
        (("name",), "x" * 5000, "'latents'"),
        (("dtype",), "../x", "of type '../x', which is none"),
        (("shape", 1), -1, "with a size below 0"),
    ],
    ids=["half a size", "an unknown size", "another name", "no type", "less than nothing"],
)
def test_a_signature_that_no_engine_has_is_refused_in_short(bundle, place, value, said):
    data = json.loads((bundle / MANIFEST).read_text())
    inputs = data["targets"][0]["engines"]["compute"]["signature"]["inputs"]
    changed = next(one for one in inputs if one["name"] == "latents")
    for key in place[:-1]:
        changed = changed[key]
    changed[place[-1]] = value
    data["digest"] = _digest({k: v for k, v in data.items() if k != "digest"})
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=re.escape(said)) as refused:
        cachec.load(bundle).session()
    assert len(str(refused.value).replace(str(bundle), "x")) < 400


def test_a_program_with_more_slots_than_any_has_is_refused(bundle):
    name = Bundle.open(bundle).manifest.programs["default"]["json"]
    data, arrays = json.loads((bundle / name).read_text()), Bundle.open(bundle).program().arrays()
    data["instructions"][0]["slot"] = 10**20
    with pytest.raises(BundleError, match="slot of instruction 'compute' is 100000000000000000000, expected numbers below"):
        Program.from_json(data, arrays)


def test_a_bundle_for_another_device_is_refused(bundle):
    assert Bundle.open(bundle).target.device == ANY_DEVICE
    rewrite_manifest(bundle, targets=(replace(Bundle.open(bundle).target, device="cuda"),))
    with pytest.raises(BundleError, match=r"device is cpu, but it was built for cuda\nMake one that fits with cachec compile"):
        cachec.load(bundle, device="cpu")


def test_an_unknown_level_is_named(bundle):
    with pytest.raises(InputError, match="unknown level 'defualt'. Did you mean 'default'"):
        Bundle.open(bundle).program("defualt")


def test_manifest_round_trip(toy_bundle):
    manifest = Bundle.open(toy_bundle).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert isinstance(manifest.targets[0], Target)


def test_large_files_are_hashed_once_and_again_on_request(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cachec.runtime.checked_files.LARGE_FILE_BYTES", 0)
    Bundle.open(bundle)
    hashed, hash_file = [], checked_files.hash_file
    monkeypatch.setattr("cachec.runtime.checked_files.hash_file", lambda path: hashed.append(path) or hash_file(path))
    Bundle.open(bundle)
    assert not hashed
    Bundle.open(bundle, verify=True)
    assert len(hashed) == len(Bundle.read_manifest(bundle).files)


def test_a_damaged_large_file_that_keeps_its_times_is_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cachec.runtime.checked_files.LARGE_FILE_BYTES", 0)
    Bundle.open(bundle)
    path = only(bundle, "compute*.pt2")
    before, content = path.stat(), bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        Bundle.open(bundle)


def test_loading_runs_what_the_bundle_holds(bundle):
    with cachec.load(bundle) as loaded:
        latents = loaded.denoise({"prompt": np.ones((2, 8), np.float32)}, seeds=[0, 1])
    assert latents.shape == (2, 6, 8)
    assert np.isfinite(latents).all()


UNPICKLING = """
import sys
import numpy as np
import cachec

sys.addaudithook(lambda event, given: sys.exit(f"{event} {given}") if event == "pickle.find_class" else None)
with cachec.load(sys.argv[1]) as loaded:
    assert np.isfinite(loaded.denoise({"prompt": np.ones((1, 8), np.float32)}, seeds=[0])).all()
"""


def test_nothing_of_a_bundle_is_unpickled(bundle):
    """An unpickler that finds a class by name is one that can be made to call it."""
    child = subprocess.run([sys.executable, "-c", UNPICKLING, bundle], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")


READING = """
import os
import sys
import numpy as np
import cachec

root = os.path.realpath(sys.argv[1])
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chmod")

def watch(event, given):
    writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    places = [one for one in given[:2] if isinstance(one, str | os.PathLike)] if writes or event in CHANGES else []
    if any(os.path.realpath(one).startswith(root) for one in places):
        sys.exit(f"{event} {given}")

sys.addaudithook(watch)
with cachec.load(root) as loaded:
    assert np.isfinite(loaded.denoise({"prompt": np.ones((1, 8), np.float32)}, seeds=[0])).all()
"""


def test_a_bundle_that_may_only_be_read_runs_and_nothing_is_written_beside_its_files(toy_bundle, tmp_path):
    """Root may write anywhere, so what is tried is looked at, too."""
    root = shutil.copytree(toy_bundle, tmp_path / "toy.cachec")
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(root.rglob("*"))
    child = subprocess.run([sys.executable, "-c", READING, root], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    assert sorted(root.rglob("*")) == before
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
