import numpy as np
import pytest
import torch
from toy_bundle import SCHEDULE, SIGMAS, STEPS, eager_velocity, output_table, split_toy, write_output_bundle

import cachec
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session

SHAPE = (6, 8)


@pytest.fixture(scope="module")
def loaded(toy_bundle):
    with cachec.load(toy_bundle) as bundle:
        yield bundle


def noise(*seeds):
    return np.stack([make_noise(seed, SHAPE) for seed in seeds])


def prompt(*seeds):
    return {"prompt": np.stack([make_noise(100 + seed, (8,)) for seed in seeds])}


def run_alone(loaded, *seeds):
    return loaded.session(batch=len(seeds)).run(prompt(*seeds), noise(*seeds))


def fill(session, value):
    for slots in session.slots.values():
        slots[:] = value


def begin_on_stale_slots(loaded, seed):
    session = loaded.session()
    fill(session, np.nan)
    session.begin(prompt(seed), noise(seed))
    return session


def test_the_program_computes_some_steps_and_forecasts_the_others(loaded):
    program = loaded.programs["default"]
    assert program.compute_steps == SCHEDULE.compute
    assert 0 < len(program.compute_steps) < STEPS


def test_the_program_forecasts_before_all_slots_are_written(loaded):
    program = loaded.programs["default"]
    assert min(i.num_slots for i in program.instructions if i.rows) < program.capacity


def test_interleaved_sessions_equal_sessions_alone_bit_for_bit(loaded):
    first, second = begin_on_stale_slots(loaded, 1), begin_on_stale_slots(loaded, 2)
    while not first.finished:
        first.advance()
        second.advance()
    assert np.array_equal(first.latents, run_alone(loaded, 1))
    assert np.array_equal(second.latents, run_alone(loaded, 2))
    assert not np.array_equal(first.latents, second.latents)


@pytest.mark.parametrize("behind", [1, 3])
def test_sessions_may_be_at_different_steps(loaded, behind):
    first, second = begin_on_stale_slots(loaded, 1), begin_on_stale_slots(loaded, 2)
    for _ in range(behind):
        first.advance()
    while not first.finished:
        second.advance()
        first.advance()
    while not second.finished:
        second.advance()
    assert np.array_equal(first.latents, run_alone(loaded, 1))
    assert np.array_equal(second.latents, run_alone(loaded, 2))


def test_a_session_that_is_used_again_forgets_the_request_before(loaded):
    session = loaded.session()
    session.run(prompt(1), noise(1))
    assert np.array_equal(session.run(prompt(2), noise(2)), run_alone(loaded, 2))


def test_a_request_may_be_dropped_halfway(loaded):
    session = begin_on_stale_slots(loaded, 1)
    session.advance()
    assert np.array_equal(session.run(prompt(2), noise(2)), run_alone(loaded, 2))


def test_a_batch_equals_its_samples_alone(loaded):
    together = run_alone(loaded, 1, 2, 3)
    alone = np.concatenate([run_alone(loaded, seed) for seed in (1, 2, 3)])
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


def test_forecasting_differs_from_computing_every_step_but_not_much(loaded):
    full = loaded.session(level=UNCACHED).run(prompt(1), noise(1))
    error = np.abs(full - run_alone(loaded, 1)).max()
    assert 1e-6 < error < 0.5 * np.abs(full).max()


def with_value(array, value):
    array = array.copy()
    array.flat[3] = value
    return array


BAD_REQUESTS = {
    "noise of another shape": (prompt(1), noise(1)[:, :5], "'latents' has shape .* for height 6, width 8, text tokens 0"),
    "noise of another batch": (prompt(1), noise(1, 2), "'latents' has shape .* this session takes batches of 1, and"),
    "noise without batch": (prompt(1), noise(1)[0], "'latents' has shape"),
    "noise of another dtype": (prompt(1), noise(1).astype(np.float64), "'latents' has dtype float64"),
    "NaN in the noise": (prompt(1), with_value(noise(1), np.nan), "'latents' holds NaN .*what made it$"),
    "infinity in the noise": (prompt(1), with_value(noise(1), np.inf), "'latents' holds NaN or infinity"),
    "condition missing": ({}, noise(1), "conditions are .'prompt'., got"),
    "condition unknown": ({**prompt(1), "lora": noise(1)}, noise(1), "conditions are .'prompt'., got .*lora"),
    "condition of another shape": ({"prompt": noise(1)}, noise(1), "'prompt' has shape"),
    "condition of another batch": (prompt(1, 2), noise(1), "'prompt' has shape"),
    "condition of another dtype": ({"prompt": prompt(1)["prompt"].astype(np.float16)}, noise(1), "'prompt' has dtype"),
    "NaN in a condition": ({"prompt": with_value(prompt(1)["prompt"], np.nan)}, noise(1), "'prompt' holds NaN"),
}


@pytest.mark.parametrize(("conditions", "start", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_and_leaves_the_session_usable(loaded, conditions, start, message):
    session = loaded.session()
    with pytest.raises(InputError, match=message):
        session.run(conditions, start)
    assert session.finished
    assert np.array_equal(session.run(prompt(1), noise(1)), run_alone(loaded, 1))


@pytest.mark.parametrize(("conditions", "start", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_leaves_the_running_one_alone(loaded, conditions, start, message):
    session = begin_on_stale_slots(loaded, 1)
    session.advance()
    with pytest.raises(InputError, match=message):
        session.begin(conditions, start)
    while not session.finished:
        session.advance()
    assert np.array_equal(session.latents, run_alone(loaded, 1))


def test_advancing_a_finished_session_is_refused(loaded):
    session = loaded.session()
    with pytest.raises(InputError, match=r"finished: call begin\(\)"):
        session.advance()
    wanted = session.run(prompt(1), noise(1))
    with pytest.raises(InputError, match=r"finished: call begin\(\)"):
        session.advance()
    assert np.array_equal(session.latents, wanted)


@pytest.mark.parametrize("batch", [0, -1])
def test_an_empty_batch_is_refused(loaded, batch):
    with pytest.raises(InputError, match=f"batch is {batch}"):
        loaded.session(batch=batch)


def test_a_batch_beyond_what_graphs_are_captured_for_is_refused(loaded):
    with pytest.raises(InputError, match="batch is 1025; it must be from 1 to 1024"):
        loaded.session(batch=1025)


def test_denoising_without_seeds_is_refused(loaded):
    with pytest.raises(InputError, match="batch is 0"):
        loaded.denoise(prompt(1), seeds=[])


def test_an_unknown_level_is_refused(loaded):
    with pytest.raises(InputError, match="unknown level 'fast'. Known: default, uncached"):
        loaded.session(level="fast")


def test_run_returns_a_copy(loaded):
    session = loaded.session()
    result = session.run(prompt(1), noise(1))
    kept = result.copy()
    session.run(prompt(2), noise(2))
    assert np.array_equal(result, kept)
    result[:] = 0
    assert session.latents.any()


def test_the_inputs_of_a_request_are_not_written_to(loaded):
    conditions, start = prompt(1), noise(1)
    loaded.session().run(conditions, start)
    assert np.array_equal(start, noise(1))
    assert np.array_equal(conditions["prompt"], prompt(1)["prompt"])


def test_changing_the_inputs_after_begin_changes_nothing(loaded):
    conditions, start = prompt(1), noise(1)
    session = loaded.session()
    session.begin(conditions, start)
    conditions["prompt"][:] = 0
    start[:] = 0
    while not session.finished:
        session.advance()
    assert np.array_equal(session.latents, run_alone(loaded, 1))


def test_denoise_starts_from_the_noise_of_its_seeds(loaded):
    assert np.array_equal(loaded.denoise(prompt(1, 2), seeds=[1, 2]), run_alone(loaded, 1, 2))


# The output cut: velocities in the slots, a row for each gap, no forecast engine


@pytest.fixture(scope="module")
def output_bundles(tmp_path_factory):
    out, split = tmp_path_factory.mktemp("bundles"), split_toy(head_axis=True)
    return {name: write_output_bundle(split, out / name, name) for name in ("eager", "ort")}


@pytest.fixture(scope="module", params=["eager", "ort"])
def output(request, output_bundles):
    with cachec.load(output_bundles[request.param]) as bundle:
        yield bundle


def velocity_of(loaded, x, timestep, conditions):
    """One call of the compute engine, by hand."""
    times = np.array([timestep], np.float32)
    prologue, compute = loaded.engines["prologue"], loaded.engines["compute"]
    sizes = {"batch": len(x), "compute_steps": 1}
    hoisted = {spec.name: np.zeros(spec.resolve(sizes), spec.dtype) for spec in prologue.signature.outputs}
    prologue.context().run({"compute_timesteps": times, **conditions}, hoisted)
    velocity = np.empty_like(x)
    inputs = {"latents": x, "delta": np.zeros(len(x), np.float32), "step_values": hoisted["compute_step_values"][0]}
    compute.context().run(inputs, {"velocity": velocity})
    return velocity


def straight_line(velocity, start):
    """x = noise + sum of weighted velocities, computed step by computed step."""
    table, x, velocities = output_table(), start, []
    for row, timestep in zip(table.coefficients, table.timesteps, strict=True):
        velocities.append(velocity(x, timestep).astype(np.float64))
        x = (start + sum(weight * v for weight, v in zip(row, velocities, strict=False))).astype(np.float32)
    return x


def test_an_output_bundle_has_no_forecast_engine_and_computes_its_schedule(output):
    assert set(output.engines) == {"prologue", "compute", "advance"}
    assert output.programs["default"].compute_steps == SCHEDULE.compute
    assert output.session().slots["velocity"].shape == (len(SCHEDULE.compute), 1, *SHAPE)


def test_an_output_program_is_the_recursion_written_out(output):
    conditions = prompt(1, 2)
    expected = straight_line(lambda x, timestep: velocity_of(output, x, timestep, conditions), noise(1, 2))
    np.testing.assert_allclose(run_alone(output, 1, 2), expected, atol=2e-6, rtol=2e-6)


def test_an_output_program_is_the_recursion_on_the_model_itself(output):
    def velocity(x, timestep):
        given = {"latents": torch.from_numpy(x), "timestep": torch.full((1,), float(timestep))}
        return eager_velocity({**given, "prompt": torch.from_numpy(prompt(1)["prompt"])}).numpy()

    np.testing.assert_allclose(run_alone(output, 1), straight_line(velocity, noise(1)), atol=1e-4, rtol=0)


def test_the_uncached_run_is_euler_at_the_samplers_own_timesteps(output):
    x, conditions = noise(1), prompt(1)
    for step in range(STEPS):
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * velocity_of(output, x, SIGMAS[step], conditions)
    np.testing.assert_allclose(output.session(level=UNCACHED).run(conditions, noise(1)), x, atol=1e-6, rtol=0)


def test_slots_hold_velocities_and_those_not_written_yet_are_never_read(output):
    session = begin_on_stale_slots(output, 1)
    for instruction in output.programs["default"].instructions:
        session.advance()
        written = 1 + max(*instruction.reads.get("velocity", (0,)), *instruction.writes.values(), 0)
        assert np.isfinite(session.slots["velocity"][:written]).all()
        assert np.isnan(session.slots["velocity"][written:]).all()
        assert np.isfinite(session.latents).all()
    assert session.finished
    assert np.array_equal(session.latents, run_alone(output, 1))
    first = velocity_of(output, noise(1), output_table().timesteps[0], prompt(1))
    np.testing.assert_allclose(session.slots["velocity"][0], first, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_output_sessions_may_be_interleaved(output, behind):
    first, second = begin_on_stale_slots(output, 1), begin_on_stale_slots(output, 2)
    for _ in range(behind):
        first.advance()
    while not second.finished:
        if not first.finished:
            first.advance()
        second.advance()
    assert np.array_equal(first.latents, run_alone(output, 1))
    assert np.array_equal(second.latents, run_alone(output, 2))
    assert not np.array_equal(first.latents, second.latents)


@pytest.mark.parametrize("done", [0, 1, 2, 5, 8])
def test_a_second_output_request_forgets_the_first_wherever_that_was(output, done):
    session = begin_on_stale_slots(output, 1)
    for _ in range(done):
        session.advance()
    assert np.array_equal(session.run(prompt(2), noise(2)), run_alone(output, 2))


def test_an_output_batch_equals_its_samples_alone(output):
    alone = np.concatenate([run_alone(output, seed) for seed in (1, 2, 3)])
    np.testing.assert_allclose(run_alone(output, 1, 2, 3), alone, atol=1e-5, rtol=0)


def test_output_requests_leave_their_inputs_alone(output):
    conditions, start = prompt(1), noise(1)
    session = output.session()
    session.begin(conditions, start)
    session.advance()
    kept = start.copy()
    start[:] = 0  # the session has its own copy, which every gap starts from
    while not session.finished:
        session.advance()
    assert np.array_equal(session.latents, run_alone(output, 1))
    assert np.array_equal(kept, noise(1))


def test_back_ends_agree_on_an_output_program(output_bundles):
    results = {}
    for name, path in output_bundles.items():
        assert Bundle.open(path).manifest.targets[0].backend == name
        with cachec.load(path) as bundle:
            results[name] = bundle.denoise(prompt(1, 2), seeds=[1, 2])
    np.testing.assert_allclose(results["ort"], results["eager"], atol=1e-4, rtol=0)


def test_a_program_that_forecasts_needs_the_engine_for_it(output, loaded):
    with pytest.raises(BundleError, match="the program needs the engine forecast, which the bundle lacks: compile it again"):
        Session(output.engines, loaded.programs["default"], output.io)
