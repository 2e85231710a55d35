"""Sessions on engines of numpy: both cuts against the same run written out, requests that do not fit, results that are bad."""

import copy
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
from numpy_engines import IO, SHAPE, STEPS, load, make_engines, make_program, noise, play, prompt

from cachec.runtime.abi import BATCH, FEATURE, VELOCITY
from cachec.runtime.device import Host
from cachec.runtime.engine import Call
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session
from cachec.runtime.trace import Trace

CUTS = ("hidden", "output", UNCACHED)
KIND = {"hidden": FEATURE, "output": VELOCITY}


def make_session(cut, batch=1, **options):
    return Session(make_engines(**options), make_program(cut), IO, batch=batch)


def run_alone(cut, *seeds):
    return make_session(cut, len(seeds)).run(prompt(*seeds), noise(*seeds))


@pytest.mark.parametrize("cut", CUTS)
def test_a_session_is_the_run_written_out(cut):
    session, wanted = make_session(cut, 2), play(cut, 1, 2)
    for slots in session.slots.values():
        slots[:] = np.nan  # what is not written yet is never read
    session.begin(prompt(1, 2), noise(1, 2))
    for instruction in session.program.instructions:
        session.advance()
        if instruction.moves:
            np.testing.assert_allclose(session.latents, wanted[instruction.moves[-1]], atol=1e-5)
    assert session.finished
    assert session.latent_shape == (2, *SHAPE)
    np.testing.assert_array_equal(session.latents, run_alone(cut, 1, 2))


def test_forecasting_differs_from_computing_every_step_but_not_much():
    full = run_alone(UNCACHED, 1)
    for cut in KIND:
        assert 1e-4 < np.abs(run_alone(cut, 1) - full).max() < 0.5


@pytest.mark.parametrize("cut", KIND)
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_interleaved_sessions_equal_sessions_alone_bit_for_bit(cut, behind):
    first, second = make_session(cut), make_session(cut)
    for session, seed in ((first, 1), (second, 2)):
        session.slots[KIND[cut]][:] = np.nan
        session.begin(prompt(seed), noise(seed))
    for _ in range(behind):
        first.advance()
    while not second.finished:
        if not first.finished:
            first.advance()
        second.advance()
    np.testing.assert_array_equal(first.latents, run_alone(cut, 1))
    np.testing.assert_array_equal(second.latents, run_alone(cut, 2))


@pytest.mark.parametrize("cut", KIND)
def test_a_request_may_be_dropped_halfway(cut):
    session = make_session(cut)
    session.begin(prompt(1), noise(1))
    for _ in range(3):
        session.advance()
    np.testing.assert_array_equal(session.run(prompt(2), noise(2)), run_alone(cut, 2))


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_equals_its_samples_alone(cut):
    alone = np.concatenate([run_alone(cut, seed) for seed in (1, 2, 3)])
    np.testing.assert_allclose(run_alone(cut, 1, 2, 3), alone, atol=1e-6)


def with_nan(array):
    array = array.copy()
    array.flat[3] = np.nan
    return array


BAD_REQUESTS = {
    "shape": (prompt(1), noise(1)[:, :2], "'latents' has shape .* for height 3, width 4"),
    "batch": (prompt(1), noise(1, 2), "'latents' has shape .* this session takes batches of 1, and"),
    "dtype": (prompt(1), noise(1).astype(np.float64), "'latents' has dtype float64"),
    "NaN": (prompt(1), with_nan(noise(1)), "'latents' holds NaN .*what made it$"),
    "missing": ({}, noise(1), "conditions are .'prompt'., got"),
    "unknown": ({**prompt(1), "lora": noise(1)}, noise(1), "conditions are .'prompt'., got .*lora"),
    "condition's batch": (prompt(1, 2), noise(1), "'prompt' has shape"),
    "NaN in a condition": ({"prompt": with_nan(prompt(1)["prompt"])}, noise(1), "'prompt' holds NaN"),
}


@pytest.mark.parametrize(("conditions", "start", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_and_leaves_the_running_one_alone(conditions, start, message):
    session = make_session("hidden")
    session.begin(prompt(1), noise(1))
    session.advance()
    for attempt in (session.begin, session.run):
        with pytest.raises(InputError, match=message):
            attempt(conditions, start)
    while not session.finished:
        session.advance()
    np.testing.assert_array_equal(session.latents, run_alone("hidden", 1))


def test_advancing_a_finished_session_is_refused():
    session = make_session("hidden")
    for _ in range(2):
        with pytest.raises(InputError, match=r"finished: call begin\(\)"):
            session.advance()
        session.run(prompt(1), noise(1))


@pytest.mark.parametrize("batch", [0, -1, 1025])
def test_impossible_batches_are_refused(batch):
    with pytest.raises(InputError, match=f"batch is {batch}; it must be from 1 to 1024"):
        make_session("hidden", batch)


def test_a_program_for_one_batch_refuses_others():
    program = make_program("hidden")
    program = replace(program, key=replace(program.key, batch=2))
    with pytest.raises(InputError, match="batch is 1; this bundle was compiled for batches of 2"):
        Session(make_engines(), program, IO)


@pytest.mark.parametrize("cut", KIND)
def test_a_request_may_be_played_with_other_numbers(cut):
    session, program = make_session(cut), make_program(cut)
    told, rows = program.timesteps * np.float32(0.9), program.coefficients * np.float32(1.1)
    other = Session(make_engines(), replace(program, coefficients=rows, timesteps=told), IO)
    for _ in range(2):
        session.take_numbers(coefficients=rows, timesteps=told)
        np.testing.assert_array_equal(session.run(prompt(1), noise(1)), other.run(prompt(1), noise(1)))
        session.take_numbers()
        np.testing.assert_array_equal(session.run(prompt(1), noise(1)), run_alone(cut, 1))
    session.take_numbers(timesteps=told)
    assert np.abs(session.run(prompt(1), noise(1)) - run_alone(cut, 1)).max() > 1e-4
    np.testing.assert_array_equal(session.program.timesteps, program.timesteps)


@pytest.mark.parametrize("cut", KIND)
def test_results_are_copies_and_inputs_stay_as_they_were(cut):
    session, conditions, start = make_session(cut), prompt(1), noise(1)
    result = session.run(conditions, start)
    kept = result.copy()
    session.begin(conditions, start)
    conditions["prompt"][:], start[:] = 0, 0  # the session has its own copies
    while not session.finished:
        session.advance()
    np.testing.assert_array_equal(session.latents, kept)
    result[:] = 0
    np.testing.assert_array_equal(session.latents, kept)


def test_loaded_bundles_make_sessions_by_level():
    loaded = load("hidden")
    assert (loaded.default_level, loaded.check_level(None), loaded.check_level(UNCACHED)) == ("default", "default", UNCACHED)
    np.testing.assert_array_equal(loaded.denoise(prompt(1, 2), [1, 2]), run_alone("hidden", 1, 2))
    np.testing.assert_array_equal(loaded.denoise(prompt(1), [1], level=UNCACHED), run_alone(UNCACHED, 1))
    with pytest.raises(InputError, match="unknown level 'fast'. Known: default, uncached"):
        loaded.session(level="fast")
    with pytest.raises(InputError, match="batch is 6; the engines of .* take up to 5: build them with --max-batch 6"):
        loaded.session(batch=6)
    with pytest.raises(InputError, match="batch is 0"):
        loaded.denoise(prompt(1), [])
    with loaded:
        pass
    with pytest.raises(Exception, match="the engine was closed"):
        loaded.session()


def test_a_trace_tells_every_call():
    session = make_session("output")
    session.trace = Trace()
    session.run(prompt(1), noise(1))
    assert [event["name"] for event in session.trace.events] == ["prologue", *["compute", "advance"] * 4]
    steps = [step for event in session.trace.events for step in event["args"].get("steps", [])]
    assert set(steps) == set(range(STEPS))


def broken_at(sigma):
    from numpy_engines import compute

    def broken(latents, delta, shift, prompt):
        made = compute(latents, delta, shift, prompt)
        return {name: value / 0 for name, value in made.items()} if (shift - prompt).max() / 3 <= sigma else made

    return broken


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("cut", "place"), [("hidden", "after step 6"), ("output", "after steps 6 to 7"), (UNCACHED, "after step 6")]
)
def test_latents_that_are_not_finite_are_not_handed_out(cut, place):
    session = make_session(cut, compute=broken_at(0.26))
    level = "uncached" if cut == UNCACHED else "default"
    with pytest.raises(EngineError, match=rf"level {level}: the latents hold NaN or infinity {place}\. Take another level"):
        session.run(prompt(1), noise(1))
    assert not np.isfinite(session.run(prompt(1), noise(1), on_device=True)).all()  # not looked at


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


def recording_session(device):
    session = make_session("hidden", device=device)
    watched = [Watched(operation.call, device) for (operation,) in session._instructions]
    session._instructions[:] = [[replace(op, call=call)] for (op,), call in zip(session._instructions, watched, strict=True)]
    session._binding.prologue = Watched(session._binding.prologue, device)
    return session, [session._binding.prologue, *watched]


def test_requests_are_replayed_from_the_second_on():
    device = RecordingDevice()
    session, calls = recording_session(device)
    for seed in range(4):
        np.testing.assert_array_equal(session.run(prompt(seed), noise(seed)), run_alone("hidden", seed))
        assert session.recorded == (seed > 0)
        assert device.attempts == (seed > 0)  # a session for one request records nothing
    assert session._recording.runs == 3
    assert {call.runs for call in calls} == {1}
    with pytest.raises(InputError, match="NaN"):
        session.run(prompt(1), noise(1) * np.nan)
    session.trace = Trace()  # steps and traces are not replayed
    np.testing.assert_array_equal(session.run(prompt(1), noise(1)), run_alone("hidden", 1))
    assert len(session.trace.events) == len(calls)
    assert session._recording.runs == 3


def test_what_cannot_be_recorded_is_said_once(caplog):
    device = RecordingDevice(failure="operation not permitted when stream is capturing")
    session, calls = recording_session(device)
    with caplog.at_level(logging.WARNING, logger="cachec"):
        for seed in range(3):
            np.testing.assert_array_equal(session.run(prompt(seed), noise(seed)), run_alone("hidden", seed))
    assert [record.getMessage() for record in caplog.records] == [
        "the calls of a request are made one by one: operation not permitted when stream is capturing"
    ]
    assert (device.attempts, {call.runs for call in calls}) == (1, {3})


def test_a_session_takes_arrays_of_its_device_only():
    session = make_session("hidden", 2)
    assert session.takes(noise(1))
    assert not session.takes([1.0])
    assert session.slots[FEATURE].shape == (2, 2, *SHAPE)
    assert session._binding.latent_spec.shape[0] == BATCH


def test_what_belongs_to_this_process_is_not_pickled_or_copied():
    loaded = load("hidden")
    for thing, what in (
        (loaded, "an engine"),
        (loaded.session(), "a session"),
        (loaded.session(for_sampler=True), "a session"),
    ):
        for attempt in (pickle.dumps, copy.deepcopy):
            with pytest.raises(InputError, match=f"{what} cannot be pickled or copied, it belongs to this process: load the"):
                attempt(thing)
