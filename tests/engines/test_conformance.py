"""What every engine must pass: the same bundles, built and run by each back end."""

import numpy as np
import pytest
import torch
from toy import TOKENS, WIDTH
from toy_bundle import SIGMAS, STEPS, add_predictor, split_toy, toy_program, write_bundle, write_output_bundle

import cachec
from cachec.compiler.methods.taylor import Taylor
from cachec.engines import BACKENDS
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.trace import Trace

SHAPE = (TOKENS, WIDTH)
CUTS = ("hidden", "output")
RUNNABLE = [name for name in BACKENDS if "tensorrt" not in name]  # the others need a GPU: test_on_gpu.py
COMPILED = ("aoti", "inductor")  # building takes long: one bundle each, which hands out velocities


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles by back end and cut, each made when first asked for."""
    out, split, made = tmp_path_factory.mktemp("bundles"), split_toy(head_axis=True), {}

    def bundle(backend, cut, hoist="all", *, velocities=False, slots=None):
        velocities = velocities or backend in COMPILED
        key = (backend, cut, hoist, "velocities" if velocities else "latents", str(slots))
        if key not in made:
            path = out / "-".join(key)
            if cut == "output":
                made[key] = write_output_bundle(split, path, backend, hoist, slots=slots)
            else:
                method = Taylor(order=1)
                graphs = add_predictor(split, method.predictor(None), method.window)
                made[key] = write_bundle(
                    graphs, toy_program(graphs), method, path, backend, hoist, velocities=velocities, slots=slots
                )
        return made[key]

    return bundle


@pytest.fixture(scope="module", params=[(b, c) for b in RUNNABLE for c in CUTS], ids=lambda pair: "-".join(pair))
def loaded(request, bundles):
    with cachec.load(bundles(*request.param)) as bundle:
        yield bundle


def prompt(*seeds):
    return {"prompt": np.stack([make_noise(100 + seed, (WIDTH,)) for seed in seeds])}


def noise(*seeds):
    return np.stack([make_noise(seed, SHAPE) for seed in seeds])


@pytest.mark.parametrize("level", ["default", UNCACHED])
@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_latents_equal_those_of_eager(loaded, bundles, level, seeds):
    cut = loaded.programs["default"].cut
    with cachec.load(bundles("eager", cut)) as reference:
        wanted = reference.denoise(prompt(*seeds), seeds, level=level)
    np.testing.assert_allclose(loaded.denoise(prompt(*seeds), seeds, level=level), wanted, atol=2e-5, rtol=1e-5)


def test_a_session_used_again_equals_a_new_one_bit_for_bit(loaded):
    session = loaded.session()
    first = session.run(prompt(1), noise(1))
    kept = first.copy()
    session.run(prompt(2), noise(2))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session.run(prompt(1), noise(1)), loaded.session().run(prompt(1), noise(1)))
    np.testing.assert_array_equal(first, loaded.session().run(prompt(1), noise(1)))


def test_interleaved_sessions_equal_sessions_alone(loaded):
    one, two = loaded.session(), loaded.session()
    one.begin(prompt(1), noise(1))
    two.begin(prompt(2), noise(2))
    while not (one.finished and two.finished):
        for session in (one, two):
            if not session.finished:
                session.advance()
    np.testing.assert_array_equal(one.latents, loaded.session().run(prompt(1), noise(1)))
    np.testing.assert_array_equal(two.latents, loaded.session().run(prompt(2), noise(2)))


def test_engines_write_only_the_outputs_that_are_bound(loaded):
    """And read no buffer after the call: changing an input later changes nothing."""
    engine = loaded.engines["advance"]
    rng = np.random.default_rng(0)
    inputs = {
        "base": rng.standard_normal((2, *SHAPE)).astype(np.float32),
        "velocities": rng.standard_normal((3, 2, *SHAPE)).astype(np.float32),
        "coefficients": rng.standard_normal((1, 3)).astype(np.float32),
        "base_share": np.full(1, 0.5, np.float32),
    }
    kept = {name: value.copy() for name, value in inputs.items()}
    out = np.full((2, *SHAPE), np.nan, np.float32)
    call = engine.context().bind(inputs, {"next_latents": out})
    assert np.isnan(out).all()
    call.run()
    expected = 0.5 * kept["base"] + np.einsum("gh,h...->...", kept["coefficients"], kept["velocities"])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, kept[name])
    before = out.copy()
    inputs["base"][:] = 0
    np.testing.assert_array_equal(out, before)
    call.run()  # bound to the buffers, not to what was in them
    np.testing.assert_allclose(out, expected - 0.5 * kept["base"], atol=1e-5)


def test_a_subset_of_the_outputs_may_be_bound(loaded):
    session = loaded.session(level=UNCACHED)
    assert set(loaded.engines["compute"].signature.outputs) > {loaded.engines["compute"].signature.output("velocity")}
    assert np.isfinite(session.run(prompt(1), noise(1))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "engine inputs are"),
        ({"strange": np.zeros(1, np.float32)}, "engine inputs are"),
        ({"coefficients": np.zeros((1, 3))}, r"'coefficients' is float64\[1, 3\], expected float32"),
        ({"coefficients": np.zeros((1, 4), np.float32)}, r"has shape .* expected"),
        ({"base": np.zeros((1, *SHAPE), np.float32)}, r"has shape .* expected"),
        ({"base": np.zeros((2, WIDTH, TOKENS), np.float32).swapaxes(1, 2)}, "'base' is not contiguous"),
        ({"base": torch.zeros(2, *SHAPE)}, "'base' is a Tensor, which is no buffer of cpu: upload it first"),
    ],
)
def test_wrong_inputs_are_refused(loaded, change, message):
    inputs = {
        "base": np.zeros((2, *SHAPE), np.float32),
        "velocities": np.zeros((3, 2, *SHAPE), np.float32),
        "coefficients": np.zeros((1, 3), np.float32),
        "base_share": np.ones(1, np.float32),
    }
    inputs = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        loaded.engines["advance"].context().bind(inputs, {"next_latents": np.zeros((2, *SHAPE), np.float32)})


def test_closed_engines_are_refused(bundles, loaded):
    backend = loaded.manifest.targets[0].backend
    closed = cachec.load(bundles(backend, loaded.programs["default"].cut))
    closed.close()
    with pytest.raises(BundleError, match="the engine was closed"):
        closed.session()


@pytest.mark.parametrize("hoist", ["none", "tables"])
def test_hoisting_changes_latents_by_rounding_only(loaded, bundles, hoist):
    backend, cut = loaded.manifest.targets[0].backend, loaded.programs["default"].cut
    with cachec.load(bundles(backend, cut, hoist)) as other:
        assert "prologue" not in other.engines  # nothing of the toy depends on the prompt alone
        for level in ("default", UNCACHED):
            one, two = (b.denoise(prompt(1, 2), [1, 2], level=level) for b in (loaded, other))
            np.testing.assert_allclose(one, two, atol=2e-5, rtol=1e-5)


def test_a_request_asks_the_device_for_no_new_buffer(loaded, monkeypatch):
    session = loaded.session(batch=2)
    wanted = session.run(prompt(1, 2), noise(1, 2))
    monkeypatch.setattr(type(session._device), "empty", lambda *_: pytest.fail("a buffer was made"))
    np.testing.assert_array_equal(session.run(prompt(1, 2), noise(1, 2)), wanted)


def slot_bytes(loaded):
    (slots,) = loaded.session().slots.values()
    return slots.nbytes


def test_half_precision_slots_take_half_the_memory_and_change_latents_by_their_rounding(loaded, bundles):
    backend, cut = loaded.manifest.targets[0].backend, loaded.programs["default"].cut
    if backend in COMPILED:
        pytest.skip("the same graphs as eager's")
    with cachec.load(bundles(backend, cut, slots=torch.float16)) as half:
        assert slot_bytes(half) * 2 == slot_bytes(loaded)
        one, two = (b.denoise(prompt(1, 2), [1, 2]) for b in (loaded, half))
    assert 1e-6 < np.abs(one - two).max() / np.abs(one).max() < 2e-3


def test_bfloat16_slots_are_tensors(bundles):
    with (
        cachec.load(bundles("eager", "hidden")) as plain,
        cachec.load(bundles("eager", "hidden", slots=torch.bfloat16)) as half,
    ):
        session = half.session(batch=2)
        assert session.slots["feature"].dtype == torch.bfloat16
        one, two = (s.run(prompt(1, 2), noise(1, 2)) for s in (plain.session(batch=2), session))
    assert 1e-6 < np.abs(one - two).max() / np.abs(one).max() < 2e-2


@pytest.fixture
def for_sampler(loaded, bundles):
    with cachec.load(bundles(loaded.manifest.targets[0].backend, loaded.programs["default"].cut, velocities=True)) as bundle:
        yield bundle


def test_a_sampler_outside_gets_the_same_latents(loaded, for_sampler):
    session = for_sampler.session(batch=2, for_sampler=True)
    session.begin(prompt(1, 2))
    x = noise(1, 2)
    for step in range(STEPS):
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * session.velocity(step, x)
    np.testing.assert_allclose(x, loaded.denoise(prompt(1, 2), [1, 2]), atol=1e-5, rtol=1e-5)


def test_engines_that_hand_out_no_velocities_are_not_for_a_sampler_outside(loaded):
    if loaded.programs["default"].cut == "output" or loaded.manifest.targets[0].backend in COMPILED:
        pytest.skip("the output cut forecasts no velocities, and these bundles hand them out")
    with pytest.raises(InputError, match="a sampler outside needs velocities.*compile the bundle without --no-velocities"):
        loaded.session(for_sampler=True)


def test_a_sampler_outside_must_take_the_steps_in_order(for_sampler):
    session = for_sampler.session(for_sampler=True)
    session.begin(prompt(1))
    with pytest.raises(InputError, match="step 1 was asked for, but step 0 is next"):
        session.velocity(1, noise(1))
    session.velocity(0, noise(1))
    with pytest.raises(InputError, match="step 0 was asked for, but step 1 is next"):
        session.velocity(0, noise(1))


def test_a_trace_tells_where_the_time_went(loaded):
    session = loaded.session()
    session.trace = Trace()
    session.run(prompt(1), noise(1))
    names = [event["name"] for event in session.trace.events]
    program = loaded.programs["default"]
    assert names == ["prologue", *(op.engine for op in session._operations)]
    assert names.count("compute") == len(program.compute_steps)
    steps = [step for event in session.trace.events for step in event["args"].get("steps", [])]
    assert sorted(set(steps)) == list(range(STEPS))
    assert all(event["dur"] > 0 for event in session.trace.events)
