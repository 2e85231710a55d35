"""ONNX Runtime with its TensorRT execution provider, where a TensorRT of the right version is.

The provider of the public ``onnxruntime-gpu`` wheels is linked with TensorRT 10, so that it cannot live in one environment with
the ``tensorrt`` back end, which is written for 11. It builds its engines on the machine, when a session first runs, and keeps
them in the user's cache.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
from pathlib import Path

from cachec.engines.cuda_device import CudaDevice, cuda_device
from cachec.engines.ort import CUDA_PROVIDER, OrtBuilder, OrtFamily, check_provider, check_started, cuda_options, open_session
from cachec.runtime.device import CUDA, DeviceName
from cachec.runtime.errors import InputError, missing_extra
from cachec.runtime.files import cache_folder

if importlib.util.find_spec("onnxruntime") is None:
    raise missing_extra("onnxruntime", "gpu", "the ort-tensorrt backend")
import onnxruntime

log = logging.getLogger(__name__)

PROVIDER = "TensorrtExecutionProvider"
MAJOR = 10  # of TensorRT, as the wheels of ONNX Runtime up to 1.31 are linked
LIBRARY = f"libnvinfer.so.{MAJOR}"
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-libs", "tensorrt-cu12-libs")


class OrtTensorRTEngine(OrtFamily):
    """TensorRT 10 through ONNX Runtime; what it does not take runs on CUDA."""

    name = "ort-tensorrt"
    only_device = CUDA

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        if device.kind != CUDA:
            raise InputError(f"device is {device}, but {cls.name} runs on NVIDIA GPUs only: use --device cuda")
        check_provider(PROVIDER, device)
        check_library()
        cuda_device(device)

    @classmethod
    def open_on_gpu(cls, path: Path, device: CudaDevice) -> onnxruntime.InferenceSession:
        load_library()
        folder = str(cache_folder() / "ort-tensorrt")
        own = {
            "device_id": str(device.index),
            "user_compute_stream": str(device.stream),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
        session = open_session(path, [(PROVIDER, own), (CUDA_PROVIDER, cuda_options(device))])
        check_started(session, PROVIDER, device)
        return session


def check_library() -> None:
    """Raise ``InputError`` unless there is a TensorRT of the major version that the provider is linked with."""
    found = installed_versions()
    if any(version.split(".")[0] == str(MAJOR) for version in found.values()):
        return
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        here = ", ".join(f"{name} {version}" for name, version in found.items()) or "no TensorRT"
        raise InputError(
            f"the TensorRT provider of onnxruntime {onnxruntime.__version__} needs TensorRT {MAJOR} ({LIBRARY}), "
            f"and here is {here}: "
            f"pip install 'tensorrt-cu13>={MAJOR},<{MAJOR + 1}' in an environment of its own, or take --target tensorrt"
        ) from error


def installed_versions() -> dict[str, str]:
    """Versions of TensorRT that pip knows of."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            log.debug("%s is not installed", package)
    return found


def load_library() -> None:
    """Load TensorRT's shared libraries where pip put them, so that the provider finds them."""
    if importlib.util.find_spec("tensorrt") is not None and installed_versions():
        importlib.import_module("tensorrt")


ENGINE = OrtTensorRTEngine
BUILDER = OrtBuilder(OrtTensorRTEngine, device_bound=True)
