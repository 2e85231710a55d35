"""What every engine must pass: the same bundle, run by each back end. What compiles C++ has tests of its own."""

import numpy as np
import pytest
import torch
from toy import TOKENS, WIDTH

import cachec
from cachec.runtime.abi import BASE, BASE_SHARE, COEFFICIENTS, COMPUTE, NEXT_LATENTS, VELOCITIES
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.trace import Trace

SHAPE = (TOKENS, WIDTH)
LEVELS = ("default", "output", UNCACHED)


@pytest.fixture(scope="module", params=["eager", "ort"])
def loaded(request, toys):
    with cachec.load(toys, target=request.param) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def reference(toys):
    with cachec.load(toys, target="eager") as bundle:
        yield bundle


@pytest.fixture(params=["default", "output"])
def session(request, loaded):
    return loaded.session(level=request.param)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_latents_equal_those_of_eager(loaded, reference, request_of, level, seeds):
    conditions, _ = request_of(*seeds)
    wanted = reference.denoise(conditions, seeds, level=level)
    np.testing.assert_allclose(loaded.denoise(conditions, seeds, level=level), wanted, atol=2e-5, rtol=1e-5)


def test_a_session_used_again_equals_a_new_one_bit_for_bit(loaded, session, request_of):
    first = session.run(*request_of(1))
    kept = first.copy()
    session.run(*request_of(2))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session.run(*request_of(1)), first)


def test_interleaved_sessions_equal_sessions_alone(loaded, request_of):
    one, two = loaded.session(), loaded.session()
    for session, seed in ((one, 1), (two, 2)):
        session.begin(*request_of(seed))
    while not (one.finished and two.finished):
        for session in (one, two):
            if not session.finished:
                session.advance()
    np.testing.assert_array_equal(one.latents, loaded.session().run(*request_of(1)))
    np.testing.assert_array_equal(two.latents, loaded.session().run(*request_of(2)))


@pytest.mark.parametrize("level", LEVELS)
def test_a_sampler_outside_gets_the_same_latents(loaded, request_of, level):
    stepper, (conditions, x) = loaded.session(batch=2, level=level, for_sampler=True), request_of(1, 2)
    stepper.begin(conditions)
    for step, delta in enumerate(np.diff(stepper.program.sigmas)):
        x = x + delta * stepper.velocity(step, x)
    np.testing.assert_allclose(x, loaded.denoise(conditions, [1, 2], level=level), atol=1e-5, rtol=1e-5)


def inputs_of_advance():
    rng = np.random.default_rng(0)
    shapes = {BASE: (2, *SHAPE), VELOCITIES: (3, 2, *SHAPE), COEFFICIENTS: (1, 3), BASE_SHARE: (1,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_engines_write_only_the_outputs_that_are_bound(loaded):
    """And read no buffer after the call: changing an input later changes nothing."""
    inputs = inputs_of_advance()
    kept = {name: value.copy() for name, value in inputs.items()}
    out = np.full((2, *SHAPE), np.nan, np.float32)
    call = loaded.engines["advance"].context().bind(inputs, {NEXT_LATENTS: out})
    assert np.isnan(out).all()
    call.run()
    moved = np.einsum("gh,h...->...", kept[COEFFICIENTS], kept[VELOCITIES])
    np.testing.assert_allclose(out, kept[BASE_SHARE] * kept[BASE] + moved, atol=1e-5)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, kept[name])
    before = out.copy()
    inputs[BASE][:] = 0
    np.testing.assert_array_equal(out, before)
    call.run()  # bound to the buffers, not to what was in them
    np.testing.assert_allclose(out, moved, atol=1e-5)


def test_a_subset_of_the_outputs_may_be_bound(loaded, request_of):
    assert len(loaded.engines[COMPUTE].signature.outputs) > 1
    assert np.isfinite(loaded.session(level=UNCACHED).run(*request_of(1))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BASE: None}, "engine inputs are"),
        ({"strange": np.zeros(1, np.float32)}, "engine inputs are"),
        ({COEFFICIENTS: np.zeros((1, 3))}, r"'coefficients' is float64\[1, 3\], expected float32"),
        ({COEFFICIENTS: np.zeros((1, 4), np.float32)}, r"has shape .* expected"),
        ({BASE: np.zeros((2, WIDTH, TOKENS), np.float32).swapaxes(1, 2)}, "'base' is not contiguous"),
        ({BASE: torch.zeros(2, *SHAPE)}, "'base' is a Tensor, which is no buffer of cpu: upload it first"),
    ],
)
def test_wrong_inputs_are_refused(loaded, change, message):
    inputs = {name: value for name, value in {**inputs_of_advance(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        loaded.engines["advance"].context().bind(inputs, {NEXT_LATENTS: np.zeros((2, *SHAPE), np.float32)})


def test_closed_engines_are_refused(toys, loaded):
    closed = cachec.load(toys, target=loaded.target.backend)
    closed.close()
    with pytest.raises(BundleError, match="the engine was closed"):
        closed.session()


def test_a_request_asks_the_device_for_no_new_buffer(loaded, request_of, monkeypatch):
    session = loaded.session(batch=2)
    wanted = session.run(*request_of(1, 2))
    monkeypatch.setattr(type(session._device), "empty", lambda *_: pytest.fail("a buffer was made"))
    np.testing.assert_array_equal(session.run(*request_of(1, 2)), wanted)


def test_a_trace_tells_where_the_time_went(loaded, session, request_of):
    session.trace = Trace()
    session.run(*request_of(1))
    names = [event["name"] for event in session.trace.events]
    assert names == ["prologue", *(op.engine for some in session._instructions for op in some)]
    assert names.count(COMPUTE) == len(session.program.compute_steps)
    steps = [step for event in session.trace.events for step in event["args"].get("steps", [])]
    assert sorted(set(steps)) == list(range(session.program.num_steps))
    assert all(event["dur"] > 0 for event in session.trace.events)
