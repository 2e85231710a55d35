"""Names of devices, buffers that find no room, and sessions on a device that records its calls."""

import logging
from dataclasses import replace

import numpy as np
import pytest

import cachec
from cachec.runtime.device import DeviceName, Host, no_room
from cachec.runtime.engine import Call
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.specs import TensorSpec, itemsize
from cachec.runtime.trace import Trace

SHAPE = (6, 8)


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


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1.5", "cpu:0", "CUDA", " cuda", "cuda:٣"])
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


class RecordingDevice(Host):
    """The host, keeping calls when told to: like a GPU, it does not carry out what it records."""

    def __init__(self, failure=None):
        self.calls, self.failure, self.attempts = None, failure, 0

    def record(self, work):
        self.attempts += 1
        if self.failure is not None:
            raise EngineError(self.failure)
        self.calls = []
        work()
        calls, self.calls = self.calls, None
        return Replay(calls)


class Replay(Call):
    def __init__(self, calls):
        self._calls, self.runs = calls, 0

    def run(self):
        self.runs += 1
        for call in self._calls:
            call.run()


class Watched(Call):
    """Runs a call, or leaves it to be recorded; counts how often it was run by itself."""

    def __init__(self, call, device):
        self._call, self._device, self.runs = call, device, 0

    def run(self):
        if self._device.calls is not None:
            self._device.calls.append(self._call)
            return
        self.runs += 1
        self._call.run()


@pytest.fixture
def loaded(toy_bundle):
    with cachec.load(toy_bundle) as bundle:
        yield bundle


def recording_session(loaded, device):
    for engine in loaded.engines.values():
        engine.device = device
    session = loaded.session()
    watched = [Watched(operation.call, device) for operation in session._operations]
    session._operations[:] = [replace(op, call=call) for op, call in zip(session._operations, watched, strict=True)]
    session._binding.prologue = Watched(session._binding.prologue, device)
    return session, [session._binding.prologue, *watched]


def request(seed):
    return {"prompt": make_noise(100 + seed, (8,))[None]}, make_noise(seed, SHAPE)[None]


def test_requests_are_replayed_from_the_second_on(loaded):
    expected = [loaded.session().run(*request(seed)) for seed in range(4)]
    device = RecordingDevice()
    session, calls = recording_session(loaded, device)
    for seed in range(4):
        np.testing.assert_array_equal(session.run(*request(seed)), expected[seed])
        assert session.recorded == (seed > 0)
        assert session.finished
    assert device.attempts == 1
    assert session._recording.runs == 3
    assert {call.runs for call in calls} == {1}  # the first request only


def test_a_session_for_one_request_records_nothing(loaded):
    device = RecordingDevice()
    session, _ = recording_session(loaded, device)
    session.run(*request(0))
    assert device.attempts == 0
    assert not session.recorded


def test_steps_and_traces_are_not_replayed(loaded):
    expected = [loaded.session().run(*request(seed)) for seed in range(3)]
    session, _ = recording_session(loaded, RecordingDevice())
    for seed in range(2):
        session.run(*request(seed))
    session.begin(*request(2))
    while not session.finished:
        session.advance()
    np.testing.assert_array_equal(session.latents, expected[2])
    session.trace = Trace()
    np.testing.assert_array_equal(session.run(*request(1)), expected[1])
    assert len(session.trace.events) == len(session._operations) + 1
    session.trace = None
    assert session._recording.runs == 1
    np.testing.assert_array_equal(session.run(*request(0)), expected[0])
    assert session._recording.runs == 2


def test_a_request_that_is_refused_leaves_the_recording_usable(loaded):
    expected = loaded.session().run(*request(1))
    session, _ = recording_session(loaded, RecordingDevice())
    for _ in range(2):
        session.run(*request(0))
    conditions, noise = request(1)
    with pytest.raises(InputError, match="NaN"):
        session.run(conditions, noise * np.nan)
    np.testing.assert_array_equal(session.run(conditions, noise), expected)


def test_what_cannot_be_recorded_is_said_once(loaded, caplog):
    expected = [loaded.session().run(*request(seed)) for seed in range(4)]
    device = RecordingDevice(failure="operation not permitted when stream is capturing")
    session, calls = recording_session(loaded, device)
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            np.testing.assert_array_equal(session.run(*request(seed)), expected[seed])
    assert [record.getMessage() for record in caplog.records] == [
        "the calls of a request are made one by one: operation not permitted when stream is capturing"
    ]
    assert device.attempts == 1
    assert {call.runs for call in calls} == {4}


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
