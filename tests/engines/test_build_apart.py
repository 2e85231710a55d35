"""Builds in another process: real ones, by TensorRT for RTX, and processes that end in every way."""

import json
import logging
import subprocess
import sys

import pytest

from cachec.engines import build_apart as module
from cachec.engines.add_target import BundledSources, add_targets
from cachec.engines.build_apart import build_apart
from cachec.engines.tensorrt_rtx import BUILDER
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, EngineError
from cachec.runtime.sizes import size_ranges

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
GPU = DeviceName("cuda")
OPTIONS = BuildOptions(sizes=size_ranges(8, 4, max_batch=3))


@pytest.fixture
def children(monkeypatch):
    """The processes that were started."""
    started, real = [], subprocess.Popen

    def start(*given, **options):
        started.append(real(*given, **options))
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    return started


def build(bundle, out):
    return build_apart(BUILDER, BundledSources(Bundle.open(bundle)), out, device=GPU, options=OPTIONS)


def test_engines_are_built_and_what_the_builder_says_is_heard(bundle, tmp_path, children, caplog):
    caplog.set_level(logging.INFO, "cachec")
    files = build(bundle, tmp_path)
    assert files == BUILDER.plan_files(BundledSources(Bundle.open(bundle)), tmp_path, GPU)
    assert all(path.stat().st_size > 10_000 for path in files.values())
    heard = [record for record in caplog.records if record.name == "cachec.engines.tensorrt_from_onnx"]
    assert {record.getMessage().split(":")[0] for record in heard} == files.keys()
    assert [child.returncode for child in children] == [0]


def test_an_error_of_the_builder_is_its_own(bundle, tmp_path):
    sources = BundledSources(Bundle.open(bundle))
    sources.onnx()["compute"].write_bytes(b"nothing of that kind")
    with pytest.raises(EngineError, match=r"^TensorRT's parser rejects compute-.*\.onnx"):
        build_apart(BUILDER, sources, tmp_path, device=GPU, options=OPTIONS)


def test_the_process_stops_when_the_one_that_waits_is_interrupted(bundle, children, monkeypatch):
    """Ctrl-C comes when the first engine is there."""

    class Interrupting(logging.Handler):
        def emit(self, record):
            raise KeyboardInterrupt

    before, log = Bundle.open(bundle).manifest, logging.getLogger("cachec.engines.tensorrt_from_onnx")
    handler = Interrupting(logging.INFO)
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("cachec"), "level", logging.INFO)
    with pytest.raises(KeyboardInterrupt):
        add_targets(bundle, ["tensorrt-rtx"], apart=True)
    assert [child.returncode for child in children] == [130]
    assert Bundle.open(bundle, verify=True).manifest == before
    assert {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} == {
        "manifest.json", *before.files,
    }  # fmt: skip


def test_a_process_that_does_not_stop_is_ended(children, monkeypatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(KeyboardInterrupt), module._child(b"\n"):
        raise KeyboardInterrupt
    assert children[0].returncode == -9


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.kill(os.getpid(), 9)", "tensorrt-rtx was ended by SIGKILL, as the system does when memory is short$"),
        ("os.kill(os.getpid(), 11)", "tensorrt-rtx was ended by SIGSEGV$"),
        ("sys.exit(7)", "tensorrt-rtx ended with code 7 and did not say why$"),
        (f"print({json.dumps({'error': ['BundleError', 'it is damaged']})!r})", "^it is damaged$"),
    ],
)
def test_how_a_process_ends_is_said(bundle, tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", f"import os, sys; {code}"))
    with pytest.raises(BundleError if "damaged" in code else EngineError, match=message):
        build(bundle, tmp_path)
