"""One piece of memory for a session: its buffers, its constants, and the scratch memory that its engines share."""

import numpy as np
import pytest

import cachec
from cachec.runtime.binding import Binding
from cachec.runtime.device import ALIGNMENT, Host
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.plan import lay_out, plan_binding


@pytest.fixture
def loaded(toy_bundle):
    with cachec.load(toy_bundle) as bundle:
        yield bundle


class CountingHost(Host):
    """Notes what it was asked for, and makes another device for each session."""

    def __init__(self):
        self.asked, self.made = [], []

    def empty(self, shape, dtype):
        self.asked.append((shape, dtype))
        return super().empty(shape, dtype)

    def for_session(self):
        self.made.append(CountingHost())
        return self.made[-1]


def bind(loaded, **options):
    return Binding(loaded.engines, loaded.programs["default"], loaded.io, batch=1, **options)


def plan_of(loaded):
    signatures = {name: engine.signature for name, engine in loaded.engines.items()}
    return plan_binding(signatures, loaded.programs["default"], loaded.io, batch=1)


def test_a_session_asks_its_own_device_once_for_all_its_memory(loaded):
    shared = CountingHost()
    for engine in loaded.engines.values():
        engine.device = shared
    first, second = bind(loaded), bind(loaded)
    assert shared.asked == []
    assert [first.device, second.device] == shared.made
    assert first.device.asked == [((lay_out(plan_of(loaded)).size,), "uint8")]


def test_buffers_are_aligned_and_filled_with_zeros(loaded):
    binding, plan = bind(loaded), plan_of(loaded)
    for name, buffer in binding._buffers.items():
        assert buffer.ctypes.data % ALIGNMENT == 0, name
        wanted = plan.buffers[name]
        assert (buffer.shape, str(buffer.dtype)) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(buffer, np.zeros(wanted.shape) if wanted.value is None else wanted.value)


def rows(shapes):
    return sum(shape[0] for shape in shapes.values() if shape)


@pytest.fixture
def asked(loaded, monkeypatch):
    """What contexts are asked, if calls take 1,000 bytes of scratch memory for every row of their inputs."""
    found = []
    kind = type(loaded.engines["compute"].context())
    monkeypatch.setattr(kind, "scratch_bytes", lambda context, shapes: found.append(shapes) or 1000 * rows(shapes))
    return found


def test_engines_share_the_scratch_memory_that_the_largest_call_takes(loaded, asked):
    binding, plan = bind(loaded), plan_of(loaded)
    assert asked == [{name: plan.shape(view) for name, view in call.inputs.items()} for call in plan.calls]
    assert len(asked) == (plan.prologue is not None) + len(plan.operations)
    size = 1000 * max(map(rows, asked))
    given = [context.scratch for context in binding._contexts.values()]
    assert len(given) == len(loaded.engines)
    assert {(scratch.nbytes, scratch.dtype) for scratch in given} == {(size, np.dtype(np.uint8))}
    (begin,) = {scratch.ctypes.data for scratch in given}
    assert begin % ALIGNMENT == 0
    for name, buffer in binding._buffers.items():
        assert not begin < buffer.ctypes.data + buffer.nbytes or buffer.ctypes.data >= begin + size, name


def test_without_need_there_is_no_scratch_memory(loaded):
    assert [context.scratch for context in bind(loaded)._contexts.values()] == [None] * len(loaded.engines)


def test_a_session_that_finds_no_room_says_what_all_of_it_takes(loaded, monkeypatch):
    monkeypatch.setattr(type(loaded.engines["compute"].context()), "scratch_bytes", lambda *_: 10**18)
    with pytest.raises(InputError, match=r"cpu has no room for 1000000000000\.\d MB more: take a smaller batch or size"):
        loaded.session()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_in_one_piece_of_memory_are_tensors_of_their_own(dtype):
    torch = pytest.importorskip("torch")
    from cachec.engines.torch_device import TorchDevice
    from cachec.runtime.device import DeviceName

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


def test_a_session_runs_on_torch_tensors_as_on_arrays(loaded):
    torch = pytest.importorskip("torch")
    from cachec.engines.torch_device import TorchDevice
    from cachec.runtime.device import DeviceName

    request = {"prompt": make_noise(7, (8,))[None]}, make_noise(1, (6, 8))[None]
    wanted = loaded.session().run(*request)
    for engine in loaded.engines.values():
        engine.device = TorchDevice(DeviceName("cpu"))
    session = loaded.session()
    np.testing.assert_array_equal(session.run(*request), wanted)
    kept = session.run(*request, on_device=True)
    assert isinstance(kept, torch.Tensor)
    session.run(request[0], -request[1])
    np.testing.assert_array_equal(kept.numpy(), wanted)
