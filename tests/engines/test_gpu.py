"""What GPU there is."""

import pytest
from fake_cuda import FakeCuda

from cachec.engines import cuda_runtime
from cachec.engines.gpu import Gpu, cuda_text, find_gpu
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError


def test_a_gpu_is_described_and_others_are_refused(monkeypatch):
    fake = FakeCuda(gpus=2, memory=1000, driver=13010, capability=(8, 9))
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: fake)
    assert find_gpu(DeviceName("cuda", 1)) == Gpu("Fake GPU", 89, 1000, 1000, (13, 1))
    assert cuda_text((13, 1)) == "13.1"
    with pytest.raises(InputError, match="device is cuda:2, but there are 2 GPUs"):
        find_gpu(DeviceName("cuda", 2))
