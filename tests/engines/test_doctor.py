"""``cachec doctor``: what it finds here, and on a machine with a GPU."""

import json

import pytest
from click.testing import CliRunner
from fake_cuda import FakeCuda

from cachec.cli import main
from cachec.engines import cuda_runtime
from cachec.engines.backends import BACKENDS
from cachec.engines.doctor import READY, diagnose


def test_what_this_machine_has(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: FakeCuda(gpus=0, driver=0))
    found = diagnose()
    assert found.backends.keys() == BACKENDS.keys()
    assert found.backends["ort"]["on cpu"] == READY
    assert found.backends["eager"]["on cpu"] == READY
    assert found.gpus == []
    assert "there is no NVIDIA driver" in found.no_gpu
    assert found.packages["numpy"]
    assert "CPUExecutionProvider" in found.providers
    assert "pip install 'cachec[tensorrt]'" in found.backends["tensorrt"]["on cuda"]


def test_gpus_are_listed(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: FakeCuda(gpus=2, memory=16_000_000_000, driver=13010))
    rows = dict(diagnose().rows())
    assert rows["cuda:0"] == rows["cuda:1"] == "Fake GPU, sm_90, driver for CUDA 13.1, 16.0 of 16.0 GB free"
    assert "GPU" not in rows


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_command(arguments):
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    if arguments:
        assert json.loads(result.output)["backends"].keys() == BACKENDS.keys()
    else:
        assert "onnxruntime's providers" in result.output
        assert "ort, on cpu" in result.output
