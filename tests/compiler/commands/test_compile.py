"""``cachec compile`` on the toy DiT: a bundle that is there whole, or as it was."""

import shutil
import signal

import pytest
from click.testing import CliRunner

from cachec.cli import main
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import OutputError
from cachec.runtime.work import claim_work
from cachec.runtime.write import BundleWriter


@pytest.fixture
def compile_toy(toy_directory, tmp_path):
    """Compile into ``toy.cachec``; returns the exit code and what was printed."""

    def compiled(*arguments):
        options = ["--method", "reuse", "--steps", "4", "--schedule", "0,2", "--target", "eager"]
        command = ["compile", toy_directory, "-o", tmp_path / "toy.cachec", *options, *arguments]
        result = CliRunner().invoke(main, [str(argument) for argument in command])
        return result.exit_code, result.output

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
