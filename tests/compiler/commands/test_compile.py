"""``cachec compile`` on the toy DiT: a bundle that is there whole, or as it was."""

import shutil
import signal
from importlib.util import find_spec

import pytest
from toy_product import TOY_SCHEDULE, killed, run_cli, succeed

from cachec.compiler.commands.compile import compile_to_bundle
from cachec.runtime import errors
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, MissingExtraError, OutputError
from cachec.runtime.work import claim_work
from cachec.runtime.write import BundleWriter

OPTIONS = ["--method", "adams", "--steps", "4", "--schedule", "0,2", "--target", "eager"]


@pytest.fixture
def compile_toy(toy_directory, tmp_path):
    """Compile into ``toy.cachec``; returns the exit code and what was printed."""

    def compiled(*arguments):
        return run_cli("compile", toy_directory, "-o", tmp_path / "toy.cachec", *OPTIONS, *arguments)

    return compiled


def test_an_interrupted_compile_leaves_the_old_bundle_and_nothing_else(compile_toy, toy_bundle, tmp_path, monkeypatch):
    """Ctrl-C at the last moment: all files are collected, none is moved."""
    out = shutil.copytree(toy_bundle, tmp_path / "toy.cachec")
    before, commit, collected = Bundle.open(out).manifest, BundleWriter.commit, []

    def interrupt(self, manifest):
        collected.extend(self.files)
        signal.raise_signal(signal.SIGINT)
        commit(self, manifest)

    monkeypatch.setattr(BundleWriter, "commit", interrupt)
    code, output = compile_toy("--force")
    assert (code, output.splitlines()[-1]) == (130, "interrupted")
    assert len(collected) > 4
    assert Bundle.open(out, verify=True).manifest == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_place_where_another_process_compiles_is_refused_at_once(compile_toy, tmp_path):
    with claim_work(tmp_path / "toy.cachec.timing", "compilation"):
        code, output = compile_toy()
    assert code == OutputError.exit_code
    assert "another process works on this compilation" in output
    assert list(tmp_path.iterdir()) == []


def test_a_killed_compile_leaves_no_bundle_and_the_next_one_cleans_up(compile_toy, tmp_path, toy_directory):
    out = tmp_path / "toy.cachec"
    killed("compile", toy_directory, "-o", out, *OPTIONS, at="cachec.runtime.write:BundleWriter.commit*1", cwd=tmp_path)
    assert len(list(tmp_path.iterdir())) > 0
    with pytest.raises(BundleError):
        Bundle.open(out)
    code, output = compile_toy()
    assert code == 0, output
    assert list(tmp_path.iterdir()) == [out]


def test_a_failing_compile_with_force_leaves_the_old_bundle(toy_bundle, tmp_path, toy_directory):
    shutil.copytree(toy_bundle, tmp_path / "out")
    before = Bundle.open(tmp_path / "out").manifest.to_json()
    given = [*TOY_SCHEDULE, "--predictor", tmp_path / "missing", "-o", tmp_path / "out", "--force"]
    assert "does not exist" in run_cli("compile", toy_directory, *given)[1]
    assert Bundle.open(tmp_path / "out").manifest.to_json() == before


def test_force_replaces_a_bundle_and_removes_its_files(toy_bundle, tmp_path, toy_directory):
    out = shutil.copytree(toy_bundle, tmp_path / "out")
    given = ["--method", "taylor", "--set", "order=2", "--steps", "6", "--target", "eager"]
    succeed("compile", toy_directory, *given, "-o", out, "--force")
    bundle = Bundle.open(out)
    assert not set(Bundle.open(toy_bundle).manifest.files) <= set(bundle.manifest.files)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert files == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.method["options"] == {"order": 2}


def test_without_torch_the_extra_is_named_and_the_default_place_is_not_touched(toy_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"compiling needs 'torch'.*pip install 'cachec\[compile\]'"):
        compile_to_bundle(str(toy_directory), None, force=False)
    assert list(tmp_path.iterdir()) == []


def test_the_default_place_is_named_by_model_and_method(toy_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, result = compile_to_bundle(str(toy_directory), None, force=False, method="adams", steps=4, targets="eager")
    assert str(out) == "toy-adams.cachec"
    assert result.bundle.root.resolve() == (tmp_path / out).resolve()


@pytest.mark.parametrize("command", ["compile", "train", "calibrate"])
def test_loras_are_given_to_the_model_before_anything_slow(toy_directory, tmp_path, command, captures):
    (tmp_path / "a.safetensors").touch()
    code, output = run_cli(command, toy_directory, "--lora", tmp_path / "a.safetensors", "-o", tmp_path / "out")
    assert code == 3
    assert "the weights of toy are in memory: fuse the LoRA there" in output
    assert not captures
