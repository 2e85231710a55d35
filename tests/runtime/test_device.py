"""Names of devices, buffers that find no room, rows of batches."""

import numpy as np
import pytest

from cachec.runtime.device import DeviceName, Host, no_room
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.specs import TensorSpec, itemsize


@pytest.mark.parametrize(
    ("text", "kind", "index", "name"),
    [
        ("cpu", "cpu", 0, "cpu"),
        ("cuda", "cuda", 0, "cuda:0"),
        ("cuda:0", "cuda", 0, "cuda:0"),
        ("cuda:12", "cuda", 12, "cuda:12"),
    ],
)
def test_names_of_devices(text, kind, index, name):
    parsed = DeviceName.parse(text)
    assert (parsed.kind, parsed.index, str(parsed)) == (kind, index, name)
    assert DeviceName.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cpu:0", " cuda", "cuda:٣"])
def test_other_names_are_refused(text):
    with pytest.raises(InputError, match="device is .*; use cpu, cuda, or one of several GPUs by its number, as cuda:1"):
        DeviceName.parse(text)


def test_no_room_says_how_much_was_wanted():
    shape = (1_000_000, 3_000_000)  # more than numpy's product of 32-bit integers would hold
    assert "cuda:0 has no room for 6000000.0 MB more (5.0 MB are free)" in str(no_room("cuda:0", shape, 2, 5_000_000))
    with pytest.raises(InputError, match="cpu has no room for .* MB more: take a smaller batch or size"):
        Host().empty((2**24, 2**24, 2**10), "float32")


def test_bfloat16_has_a_spec_and_no_numpy_array():
    spec = TensorSpec("feature", ("batch", 4), "bfloat16")
    assert itemsize(spec.dtype) == 2
    with pytest.raises(InputError, match="'feature' has dtype float32, expected bfloat16"):
        spec.check(np.zeros((1, 4), np.float32))


def test_the_host_has_nothing_to_record():
    assert Host().record(lambda: pytest.fail("it must not be carried out")) is None


def test_torch_says_what_finds_no_room_on_the_cpu():
    torch = pytest.importorskip("torch")
    from cachec.engines.torch_device import TorchDevice, watching_memory

    with pytest.raises(InputError, match="cpu has no room for .* MB more"):
        TorchDevice(DeviceName("cpu")).empty((1 << 24, 1 << 24), "bfloat16")
    with pytest.raises(EngineError, match="there is no memory for a call: .*Take a smaller batch"), watching_memory("a call"):
        torch.zeros(1 << 24, 1 << 24)
    with pytest.raises(RuntimeError, match="shape"), watching_memory("a call"):
        torch.zeros(2).view(3)


def devices():
    """Of the CPU; those of GPUs are in tests/engines."""
    yield Host()
    if pytest.importorskip("torch"):
        from cachec.engines.torch_device import TorchDevice

        yield TorchDevice(DeviceName("cpu"))


def uploaded(device, values):
    buffer = device.empty(values.shape, str(values.dtype))
    device.upload(values, buffer)
    return buffer


def test_rows_of_a_batch_are_gathered_and_scattered():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    for device in devices():
        buffer = uploaded(device, values)
        picked = device.gather(buffer, [2, 0, 2])
        assert device.owns(picked)
        np.testing.assert_array_equal(device.download(picked), values[[2, 0, 2]])
        device.scatter(uploaded(device, -values[:2]), [3, 1], buffer)
        np.testing.assert_array_equal(device.download(buffer), [values[0], -values[1], values[2], -values[0]])
        np.testing.assert_array_equal(device.download(picked), values[[2, 0, 2]])
        times = uploaded(device, np.arange(3, dtype=np.int64))  # one number a sample
        np.testing.assert_array_equal(device.download(device.gather(times, [1])), [1])


@pytest.mark.parametrize("rows", [[4], [-1]])
def test_rows_that_there_are_not_are_refused(rows):
    buffer = np.zeros((4, 3), np.float32)
    with pytest.raises(InputError, match=f"there is no row {rows[0]}: the buffer has 4 rows"):
        Host().gather(buffer, rows)
    with pytest.raises(InputError, match=f"there is no row {rows[0]}"):
        Host().scatter(buffer[:1], rows, buffer)


@pytest.mark.parametrize("rows", [[1, 1], [1], [0, 1, 2]])
def test_each_scattered_row_needs_a_place_of_its_own(rows):
    buffer = np.zeros((4, 3), np.float32)
    with pytest.raises(InputError, match="2 rows cannot be scattered to rows"):
        Host().scatter(buffer[:2], rows, buffer)


def test_what_is_not_finite_is_seen():
    for device in devices():
        for value, finite in ((1.0, True), (np.nan, False), (-np.inf, False)):
            assert device.is_finite(uploaded(device, np.array([0, value], np.float32))) is finite


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_in_one_piece_of_memory_are_tensors_of_their_own(dtype):
    torch = pytest.importorskip("torch")
    from cachec.engines.torch_device import TorchDevice

    device = TorchDevice(DeviceName("cpu"))
    memory = device.empty((1024,), "uint8")
    part, empty = device.part(memory, 256, (3, 4), dtype), device.part(memory, 512, (0, 4), dtype)
    assert (part.shape, part.dtype, empty.shape) == ((3, 4), getattr(torch, dtype), (0, 4))
    assert part.data_ptr() == memory.data_ptr() + 256
    assert part.storage_offset() == 0
    assert not part._is_view()
    part.fill_(1)
    assert memory.count_nonzero() > 0
    del memory
    assert part.sum() == 12
