"""Tensors as buffers, on the CPU; ``test_on_gpu`` has the rest."""

import numpy as np
import pytest
import torch

from cachec.engines.torch_device import TorchDevice, as_tensor, device_of, is_out_of_memory, watching_memory
from cachec.runtime.device import DeviceName, Host
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.specs import Signature, TensorSpec

CPU = DeviceName("cpu")


@pytest.fixture
def device():
    return TorchDevice(CPU)


def test_buffers_hold_what_is_put_into_them(device):
    buffer = device.empty((2, 3), "bfloat16")
    assert device.owns(buffer)
    assert not buffer.any()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    device.upload(values, buffer)
    copied = device.copy(buffer)
    device.upload(-values, buffer)
    np.testing.assert_array_equal(device.download(buffer), -values)
    np.testing.assert_array_equal(device.download(copied), values)
    assert device.record(lambda: pytest.fail("it must not be carried out")) is None


def test_parts_lie_in_their_memory(device):
    memory = device.empty((1024,), "uint8")
    part = device.part(memory, 256, (2, 3), "float32")
    device.upload(np.ones((2, 3), np.float32), part)
    assert (part.data_ptr() - memory.data_ptr(), int(memory.count_nonzero())) == (256, 12)  # 0x3F800000 has two bytes


def test_numpy_arrays_serve_where_numpy_has_the_dtypes():
    kinds = {dtype: Signature((TensorSpec("x", (1,), dtype),), ()) for dtype in ("float32", "bfloat16")}
    assert isinstance(device_of(CPU, [kinds["float32"]]), Host)
    assert isinstance(device_of(CPU, kinds.values()), TorchDevice)


def test_arrays_become_tensors_on_the_same_memory():
    array = np.zeros(2, np.float32)
    as_tensor(array)[0] = 5
    assert array[0] == 5
    assert as_tensor(tensor := torch.zeros(1)) is tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"device is cuda:0, but torch.cuda.is_available\(\) is False"):
        TorchDevice(DeviceName("cuda"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB."), MemoryError()])
def test_what_there_is_no_memory_for_is_said(error):
    wanted = "there is no memory for 3 samples: (CUDA out of memory. Tried to allocate 20 GiB.|MemoryError). Take a smaller"
    with pytest.raises(EngineError, match=wanted), watching_memory("3 samples"):
        raise error


def test_which_errors_are_about_memory():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes"))
