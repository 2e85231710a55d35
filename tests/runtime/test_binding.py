"""One piece of memory for a session: its buffers, its constants, and the scratch memory that its engines share."""

import numpy as np
import pytest
from numpy_engines import IO, SIGNATURES, NumpyContext, make_engines, make_program, noise, prompt

from cachec.runtime.binding import Binding
from cachec.runtime.device import ALIGNMENT, Host
from cachec.runtime.errors import InputError
from cachec.runtime.plan import lay_out
from cachec.runtime.planner import plan_binding


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


def bind(**options):
    return Binding(make_engines(**options), make_program("hidden"), IO, batch=1)


PLAN = plan_binding(SIGNATURES, make_program("hidden"), IO, batch=1)


def test_a_session_asks_its_own_device_once_for_all_its_memory():
    shared = CountingHost()
    first, second = bind(device=shared), bind(device=shared)
    assert shared.asked == []
    assert [first.device, second.device] == shared.made
    assert first.device.asked == [((lay_out(PLAN).size,), "uint8")]


def test_buffers_are_aligned_and_filled_with_zeros():
    for name, buffer in bind()._buffers.items():
        assert buffer.ctypes.data % ALIGNMENT == 0, name
        wanted = PLAN.buffers[name]
        assert (buffer.shape, str(buffer.dtype)) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(buffer, np.zeros(wanted.shape) if wanted.value is None else wanted.value)


def rows(shapes):
    return sum(shape[0] for shape in shapes.values() if shape)


def test_engines_share_the_scratch_memory_that_the_largest_call_takes(monkeypatch):
    asked = []
    take = lambda context, shapes: asked.append(shapes) or 1000 * rows(shapes)  # noqa: E731
    monkeypatch.setattr(NumpyContext, "scratch_bytes", take)
    binding = bind()
    assert asked == [{name: PLAN.shape(view) for name, view in call.inputs.items()} for call in PLAN.calls]
    size = 1000 * max(map(rows, asked))
    given = [context.scratch for context in binding._contexts.values()]
    assert {(scratch.nbytes, scratch.dtype) for scratch in given} == {(size, np.dtype(np.uint8))}
    (begin,) = {scratch.ctypes.data for scratch in given}
    assert begin % ALIGNMENT == 0
    for name, buffer in binding._buffers.items():
        assert not begin < buffer.ctypes.data + buffer.nbytes or buffer.ctypes.data >= begin + size, name


def test_without_need_there_is_no_scratch_memory():
    assert {context.scratch for context in bind()._contexts.values()} == {None}


def test_a_session_that_finds_no_room_says_what_all_of_it_takes(monkeypatch):
    monkeypatch.setattr(NumpyContext, "scratch_bytes", lambda *_: 10**18)
    with pytest.raises(InputError, match=r"cpu has no room for 1000000000000\.\d MB more: take a smaller batch or size"):
        bind()


class Elsewhere:
    """A buffer of a device that is not the host's memory: its numbers cannot be looked at."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype


class Far(Host):
    def owns(self, value):
        return isinstance(value, Elsewhere) or super().owns(value)

    def upload(self, value, buffer):
        super().upload(value.values if isinstance(value, Elsewhere) else value, buffer)


def test_buffers_of_the_device_are_checked_by_form_only():
    binding = bind(device=Far())
    binding.take_latents(Elsewhere(noise(1) * np.nan))
    assert np.isnan(binding.noise).all()
    with pytest.raises(InputError, match="'latents' has shape"):
        binding.take_latents(Elsewhere(noise(1, 2)))


def test_nothing_is_taken_unless_all_of_it_fits():
    binding = bind()
    with pytest.raises(InputError, match="'latents' has shape"):
        binding.take(prompt(1), noise(1, 2))
    assert not binding._buffers["condition/prompt"].any()
    binding.take(prompt(1), noise(1))
    np.testing.assert_array_equal(binding._buffers["condition/prompt"], prompt(1)["prompt"])
    np.testing.assert_array_equal(binding.noise, noise(1))
    binding.take_latents(noise(2))
    np.testing.assert_array_equal(binding.noise, noise(2))
