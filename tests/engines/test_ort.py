"""What is tested on ONNX Runtime only; memory in processes of their own."""

import subprocess
import sys
from dataclasses import replace

import pytest

import cachec
from cachec.engines import ort
from cachec.engines.ort import BUILDER, OrtEngine, check_provider
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import BundleError, InputError

OPEN = """
import resource, sys
from pathlib import Path
import numpy as np
import cachec
from cachec.runtime.errors import EngineError

def taken(column):
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()

loaded = cachec.load(sys.argv[1], threads=1)
"""
STARVED = """
session = loaded.session(batch=1000)
conditions, noise = {"prompt": np.zeros((1000, 8), np.float32)}, np.zeros(session.latent_shape, np.float32)
enough_for_python = taken(0) + 500_000
resource.setrlimit(resource.RLIMIT_AS, (enough_for_python, enough_for_python))
try:
    session.run(conditions, noise)
except EngineError as error:
    print(error)
"""
PATIENT = """
session = loaded.session()
for number in range(600):
    session.run({"prompt": np.ones((1, 8), np.float32)}, np.ones(session.latent_shape, np.float32))
    if number == 99:
        before = taken(1)
print(taken(1) - before)
"""


def output_of(script, bundle):
    done = subprocess.run([sys.executable, "-c", OPEN + script, bundle], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_call_that_finds_no_memory_says_so(onnx_toy):
    message = output_of(STARVED, onnx_toy)
    assert message.startswith("ONNX Runtime cannot run a call with ")
    assert "MB of inputs and outputs" in message
    assert message.endswith("take a smaller batch: cachec inspect shows what one sample takes")


def test_memory_stays_flat_over_hundreds_of_requests(onnx_toy):
    assert int(output_of(PATIENT, onnx_toy)) < 1e6


def test_all_engines_of_a_process_share_its_threads(monkeypatch):
    monkeypatch.setattr(ort, "_pool_threads", [2])
    ort._start_thread_pool(None)
    ort._start_thread_pool(2)
    with pytest.raises(InputError, match="threads is 3, but ONNX Runtime already runs with 2 in this process"):
        ort._start_thread_pool(3)


def test_what_it_lacks_is_said():
    with pytest.raises(InputError, match="bfloat16 is what ONNX Runtime has no kernels for on the CPU"):
        OrtEngine.check_target(DeviceName("cpu"), "bfloat16")
    BUILDER.check_build(DeviceName("cpu"), "bfloat16", DEFAULTS)  # files can be written for another machine
    with pytest.raises(InputError, match="NoSuchProvider is not among onnxruntime.get_available_providers"):
        check_provider("NoSuchProvider", DeviceName("cuda"))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "compute.onnx").write_bytes(b"nothing of that kind")
    ort._start_thread_pool(None)
    with pytest.raises(BundleError, match="cannot load .*compute.onnx"):
        ort.open_session(tmp_path / "compute.onnx", [ort.CPU_PROVIDER])


def test_a_signature_with_other_names_or_sizes_than_the_files_is_refused(onnx_toy):
    with cachec.load(onnx_toy) as loaded:
        engine = loaded.engines["compute"]
        for side in ("inputs", "outputs"):
            first, *rest = sorted(getattr(engine.signature, side), key=lambda spec: -len(spec.shape))
            wrong = replace(engine.signature, **{side: (replace(first, name="/etc/passwd"), *rest)})
            with pytest.raises(BundleError, match="manifest and an ONNX file do not agree on '/etc/passwd'"):
                ort.OrtContext(engine._native, wrong, engine.device)
            wrong = replace(engine.signature, **{side: (replace(first, shape=(*first.shape[:-1], 10**12)), *rest)})
            with pytest.raises(BundleError, match="which is not the manifest's .*1000000000000"):
                ort.OrtContext(engine._native, wrong, engine.device)
