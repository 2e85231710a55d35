"""What is tested on ONNX Runtime only, in processes of their own."""

import subprocess
import sys

import pytest
from toy_bundle import add_predictor, split_toy, toy_program, write_bundle

from cachec.compiler.methods.taylor import Taylor

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
for number in range(1100):
    session.run({"prompt": np.ones((1, 8), np.float32)}, np.ones(session.latent_shape, np.float32))
    if number == 99:
        before = taken(1)
print(taken(1) - before)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    method, split = Taylor(order=1), split_toy(head_axis=True)
    graphs = add_predictor(split, method.predictor(None), method.window)
    return write_bundle(graphs, toy_program(graphs), method, tmp_path_factory.mktemp("ort") / "toy.cachec", "ort")


def output_of(script, bundle):
    done = subprocess.run([sys.executable, "-c", OPEN + script, bundle], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_call_that_finds_no_memory_says_so(bundle):
    message = output_of(STARVED, bundle)
    assert message.startswith("ONNX Runtime cannot run a call with ")
    assert "MB of inputs and outputs" in message
    assert message.endswith("take a smaller batch: cachec inspect shows what one sample takes")


def test_memory_stays_flat_over_a_thousand_requests(bundle):
    assert int(output_of(PATIENT, bundle)) < 1e6
