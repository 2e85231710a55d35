"""ONNX Runtime's TensorRT provider: only behind a check of the version that it is linked with."""

import pytest

from cachec.engines import ort_tensorrt
from cachec.engines.ort_tensorrt import OrtTensorRTEngine, check_library
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError


def test_without_the_provider_that_is_said():
    with pytest.raises(InputError, match="TensorrtExecutionProvider is not among onnxruntime.get_available_providers"):
        OrtTensorRTEngine.check_target(DeviceName("cuda"), "float32")


def test_there_is_none_on_the_cpu():
    with pytest.raises(InputError, match="ort-tensorrt runs on NVIDIA GPUs only"):
        OrtTensorRTEngine.check_target(DeviceName("cpu"), "float32")


@pytest.mark.parametrize(
    ("installed", "here"),
    [({}, "here is no TensorRT"), ({"tensorrt-cu13": "11.0.0.114"}, "here is tensorrt-cu13 11.0.0.114")],
)
def test_another_version_is_refused_by_name(monkeypatch, installed, here):
    monkeypatch.setattr(ort_tensorrt, "installed_versions", lambda: installed)
    with pytest.raises(InputError, match=rf"needs TensorRT 10 \(libnvinfer.so.10\), and {here}: .*--target tensorrt"):
        check_library()


def test_the_right_version_is_taken(monkeypatch):
    monkeypatch.setattr(ort_tensorrt, "installed_versions", lambda: {"tensorrt-cu13": "10.16.1.2"})
    check_library()
