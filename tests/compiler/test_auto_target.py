"""``compile --target auto`` on the toy: real back ends of the CPU, one that fails, and what is kept of them."""

import sys
from types import ModuleType

import pytest
from toy_model import ToyModel
from toy_product import run_cli, succeed

import cachec
from cachec.compiler import pipeline
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.engines import backends, fastest, ort
from cachec.engines.targets import TargetName
from cachec.runtime.bundle import Bundle
from cachec.runtime.device import CUDA, DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import EngineError, InputError, OutputError

WANTED = {"method": "taylor", "steps": 8, "budget": 3, "targets": "auto", "device": "cpu"}


class Broken(ort.OrtBuilder):
    def build(self, sources, out, **given):
        (out / "half.bin").write_bytes(b"half of it")
        raise RuntimeError("a library's own\nkind of error")


@pytest.fixture
def looks_at(monkeypatch):
    """The back ends that ``auto`` looks at on the CPU; ``broken`` is one that fails when it builds."""
    module = ModuleType("broken_backend")
    module.ENGINE, module.BUILDER = ort.OrtEngine, Broken(ort.OrtEngine)
    monkeypatch.setitem(sys.modules, "broken_backend", module)
    monkeypatch.setitem(backends.BACKENDS, "broken", "broken_backend")
    monkeypatch.setattr(fastest, "REFERENCE", "")  # quick to build
    return lambda *names: monkeypatch.setattr(fastest, "PREFERENCE_ON_CPU", names)


@pytest.mark.parametrize(
    "names",
    [
        ("ort", "eager"),
        *(pytest.param(names, marks=pytest.mark.slow) for names in (("eager", "ort"), ("ort", "inductor"))),
    ],
    ids="-".join,
)
def test_the_one_that_the_table_says_is_fastest_is_all_that_is_kept(tmp_path, toy_directory, looks_at, names):
    looks_at(names[0], "broken", *names[1:])
    out, flags = tmp_path / "out.cachec", ["--method", "taylor", "--steps", "8", "--budget", "3", "--device", "cpu"]
    printed = succeed("compile", toy_directory, *flags, "--target", "auto", "-o", out)
    manifest = Bundle.open(out, verify=True).manifest
    facts = manifest.facts["auto"]
    assert facts["targets"].keys() == set(names)
    ratios = {name: row["ratio"] for name, row in facts["targets"].items()}
    assert ratios[facts["kept"]] == 1.0 == min(ratios.values())
    assert [target.backend for target in manifest.targets] == [facts["kept"]]
    assert all(row["seconds"].keys() == manifest.targets[0].engines.keys() for row in facts["targets"].values())
    assert facts["failed"] == {"broken": "a library's own kind of error"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {"manifest.json", *manifest.files}
    for text in (printed, succeed("inspect", out)):
        assert f"on cpu: {facts['kept']} is kept" in text
        assert "left out: a library's own kind of error" in text
    with cachec.load(out) as bundle:
        assert bundle.target.backend == facts["kept"]


def test_none_left_is_an_error_with_all_reasons(tmp_path, looks_at):
    looks_at("broken")
    with pytest.raises(EngineError, match="no back end can be built and run: broken: a library's own kind of error"):
        compile_bundle(ToyModel(), make_request(ToyModel.spec, **WANTED), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_room_for_none_is_an_error_before_anything_is_captured(tmp_path, captures, monkeypatch):
    def refuse(*given, **more):
        raise OutputError("the bundle takes more than there is")

    monkeypatch.setattr(pipeline, "check_compile", refuse)
    with pytest.raises(EngineError, match="built and run: ort: the bundle takes more than there is; aoti: the bundle"):
        compile_bundle(ToyModel(), make_request(ToyModel.spec, **WANTED), tmp_path / "out")
    assert not captures


def test_a_device_that_is_not_there_is_refused_before_anything_is_captured(tmp_path, captures):
    wish = make_request(ToyModel.spec, **{**WANTED, "device": "cuda"})
    assert wish.device == DeviceName(CUDA)
    with pytest.raises(InputError, match="no back end can be built and run on cuda:0 here:\n.*tensorrt: "):
        compile_bundle(ToyModel(), wish, tmp_path / "out")
    assert not captures
    assert list(tmp_path.iterdir()) == []


def test_what_is_looked_at_are_all_back_ends_of_the_device_but_the_reference():
    wish = make_request(ToyModel.spec, **WANTED)
    assert wish.targets == tuple(map(TargetName, ("ort", "aoti", "inductor")))
    assert (wish.device, wish.late) == (HOST, ())
    assert TargetName("tensorrt") in make_request(ToyModel.spec, **{**WANTED, "device": "cuda"}).targets


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "auto", "--target", "ort"], "target auto takes the fastest of all: leave ort out"),
        (["--target", "auto", "--device", "cpu", "--strip-weights"], "stripped weights is for none of the targets"),
        (["--target", "auto", "--device", "cpu", "--dtype", "float64"], "dtype"),
    ],
)
def test_wrong_wishes_are_refused(tmp_path, toy_directory, flags, message):
    code, output = run_cli("compile", toy_directory, "--method", "reuse", "--steps", "4", *flags, "-o", tmp_path / "out")
    assert code == InputError.exit_code, output
    assert message in output
