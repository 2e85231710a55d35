"""CUDA's runtime: its errors, the current GPU of a thread, what is given back when, and facts."""

import pytest
from fake_cuda import FakeCuda

from cachec.engines import cuda_runtime
from cachec.engines.cuda_device import CudaDevice
from cachec.engines.cuda_runtime import call, keeping, on_gpu, release
from cachec.runtime.errors import EngineError, InputError, MissingExtraError


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda(gpus=2)
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    return fake


def test_calls_give_their_results_or_an_error_with_cudas_words(fake):
    assert call(fake, "cudaSetDevice", 0) is None
    assert call(fake, "cudaGetDevice") == 0
    assert call(fake, "cudaMemGetInfo") == (1 << 24, 1 << 24)
    fake.fail("cudaMemGetInfo", "cudaErrorLaunchFailure")
    with pytest.raises(EngineError, match=r"CUDA: cudaMemGetInfo fails with cudaErrorLaunchFailure \(719\): text of Launch"):
        call(fake, "cudaMemGetInfo")


def test_a_gpu_is_the_current_one_for_a_while(fake):
    with on_gpu(fake, 1):
        assert fake.cudaGetDevice()[1] == 1
        with pytest.raises(ZeroDivisionError), on_gpu(fake, 0):
            raise ZeroDivisionError
        assert fake.cudaGetDevice()[1] == 1
    assert fake.cudaGetDevice()[1] == 0
    fake.log.clear()
    with on_gpu(fake, 0):
        assert "cudaSetDevice" not in fake.names()


def test_what_is_given_back_during_a_capture_waits_for_its_end(fake):
    pointer = fake.cudaMalloc(8)[1]
    with keeping():
        with keeping():
            release(fake, 0, "cudaFree", pointer)
        assert fake.blocks
    assert not fake.blocks


def test_gpus_that_are_not_there(monkeypatch, fake):
    fake.gpus = 1
    with pytest.raises(InputError, match="device is cuda:1, but there are 1 GPUs, counted from 0"):
        CudaDevice(1)
    for known, message in [
        (FakeCuda(gpus=0), r"device is cuda:0, but there is no GPU here: cudaErrorNoDevice \(100\)"),
        (FakeCuda(driver=0), "there is no NVIDIA driver, and cuda-bindings is for CUDA 13.5: cudaErrorInsufficientDriver"),
        (FakeCuda(driver=0), "Install a driver for it"),
    ]:
        monkeypatch.setattr(cuda_runtime, "runtime", lambda known=known: known)
        with pytest.raises(InputError, match=message):
            CudaDevice(0)
    old = FakeCuda(driver=12040)
    old.fail("cudaGetDeviceCount", "cudaErrorInsufficientDriver")
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: old)
    with pytest.raises(InputError, match="NVIDIA's driver is for CUDA 12.4 only, and cuda-bindings is for CUDA 13.5"):
        CudaDevice(0)


def test_facts_about_a_gpu(fake):
    memory = CudaDevice(0).empty((1000,), "uint8")
    assert cuda_runtime.gpu_name(0) == "Fake GPU"
    assert cuda_runtime.compute_capability(0) == (9, 0)
    assert cuda_runtime.memory_bytes(0) == ((1 << 24) - memory.nbytes, 1 << 24)
    assert cuda_runtime.driver_version() == (13, 0)
    assert cuda_runtime.runtime_version() == (13, 5)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda_runtime.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"'cuda-bindings', which is not installed: pip install 'cachec\[gpu\]'"):
        cuda_runtime.runtime.__wrapped__()
