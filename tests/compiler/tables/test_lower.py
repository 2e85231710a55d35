"""Lowering to programs, played back by a few lines of numpy that know nothing but the instructions."""

import numpy as np
import pytest
from toy_calibration import sigmas_of

from cachec.compiler.methods.newton import Newton
from cachec.compiler.tables.coefficients import AdvanceTable, collapse, compose
from cachec.compiler.tables.lower import lower, lower_advance, lower_predictor, lower_table, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule, interval_schedule
from cachec.runtime.abi import COMPUTE, EXPERT, FEATURE, VELOCITY
from cachec.runtime.errors import InputError
from cachec.runtime.instructions import Compute
from cachec.runtime.program import ProgramKey, hash_sigmas

SIZE = 6
SCHEDULES = {
    "interval 4 of 12": interval_schedule(12, 4),
    "irregular": Schedule(15, (0, 1, 5, 6, 8, 14)),
    "no warm-up": Schedule(10, (0, 4, 5)),
    "one step": Schedule(6, (0,)),
    "all steps": Schedule(5, (0, 1, 2, 3, 4)),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def key_of(sigmas):
    return ProgramKey(len(sigmas) - 1, hash_sigmas(sigmas), {"height": 64})


def velocity(x, timestep):
    """A model that bends with latents and time."""
    return np.sin(2 * x + 3 * timestep) + 0.3 * np.roll(x, 1)


def noise(seed=0):
    return np.random.default_rng(seed).standard_normal(SIZE)


def played(program, start):
    """Latents after each instruction that moves them, and what the model was told."""
    x, slots, told, latents = start, {}, [], []
    for instruction in program.instructions:
        if instruction.computes:
            told.append(float(program.timesteps[instruction.steps[0]]))
            slots[instruction.writes[VELOCITY][0]] = velocity(x, told[-1])
        else:
            (row,) = program.coefficients[list(instruction.rows), 0]
            x = start + sum(float(row[slot]) * slots[slot] for slot in instruction.reads[VELOCITY])
            latents.append(x)
    return latents, told


def played_outside(program, x, edits=None):
    """Latents at the end of each gap, with a sampler outside that takes Euler steps; ``edits`` are added before a step."""
    slots, latents = {}, []
    for instruction in program.instructions:
        if instruction.computes:
            (step,) = instruction.steps
            slots[instruction.writes[VELOCITY][0]] = velocity(x + (edits or {}).get(step, 0), float(program.timesteps[step]))
            continue
        for step in instruction.steps:
            x = x + (edits or {}).get(step, 0)
            got = sum(float(program.rows_out[step, 0, slot]) * slots[slot] for slot in instruction.reads[VELOCITY])
            x = x + float(program.sigmas[step + 1] - program.sigmas[step]) * (got + float(program.share_out[step]) * x)
        latents.append(x)
    return latents


def forecast_table(schedule, window=3, seed=1):
    rows = np.random.default_rng(seed).standard_normal((schedule.num_steps, window)) / window
    return compose(rows, np.zeros(schedule.num_steps), schedule, feeds_back=True)


@each_schedule
def test_a_lowered_advance_is_euler_on_forecast_velocities(schedule):
    """Step by step in closed loop, as a hidden-cut program would go if the cut were at the velocity."""
    sigmas, table = sigmas_of(schedule.num_steps), forecast_table(schedule)
    x, computed, expected = noise(), [], []
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            if step:
                expected.append(x)
            computed.append(velocity(x, sigmas[step]))
            v = computed[-1]
        else:
            v = table.rows[step, : len(computed)] @ np.array(computed)
        x = x + (sigmas[step + 1] - sigmas[step]) * v
    program = lower_advance(collapse(table, sigmas), key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
    latents, _ = played(program, noise())
    np.testing.assert_allclose(latents, [*expected, x], atol=1e-5)
    np.testing.assert_allclose(played_outside(program, noise()), latents, atol=1e-5)


def test_edits_between_steps_survive_a_gap():
    """A sampler outside adds what it gets to what it has; where the model does not look again, an edit stays as it is."""
    schedule, sigmas = Schedule(8, (0, 1)), sigmas_of(8)
    program = lower_advance(collapse(forecast_table(schedule), sigmas), key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
    plain, edited = (played_outside(program, noise(), edits)[-1] for edits in (None, {4: 0.5, 6: np.ones(SIZE)}))
    np.testing.assert_allclose(edited, plain + 1.5, atol=1e-6)


@each_schedule
def test_every_velocity_keeps_its_own_slot(schedule):
    sigmas = sigmas_of(schedule.num_steps)
    program = lower_advance(collapse(forecast_table(schedule), sigmas), key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
    num = len(schedule.compute)
    assert (program.cut, program.capacity, program.compute_steps) == ("output", num, schedule.compute)
    assert [one.writes for one in program.instructions if one.computes] == [{VELOCITY: (slot,)} for slot in range(num)]
    reads = [one.reads[VELOCITY] for one in program.instructions if one.rows]
    assert reads == [tuple(range(count)) for count in range(1, num + 1)]
    assert sum((one.moves for one in program.instructions), ()) == tuple(range(schedule.num_steps))
    assert not program.bias.any()
    assert {a.dtype for a in program.arrays().values()} == {np.dtype(np.float32)}


@each_schedule
def test_polished_timesteps_go_to_computed_steps_only(schedule):
    sigmas = sigmas_of(schedule.num_steps)
    own, rows = 0.5 * sigmas[:-1], collapse(forecast_table(schedule), sigmas).coefficients
    before, polished = own.copy(), np.linspace(0.9, 0.1, len(schedule.compute))
    program = lower_advance(AdvanceTable(schedule, rows, polished), key_of(sigmas), Sampling(sigmas, own))
    computed = list(schedule.compute)
    np.testing.assert_allclose(program.timesteps[computed], polished, rtol=1e-6)
    np.testing.assert_allclose(program.timesteps[list(schedule.forecast)], own[list(schedule.forecast)], rtol=1e-6)
    np.testing.assert_array_equal(own, before)
    _, told = played(program, noise())
    np.testing.assert_allclose(told, polished, rtol=1e-6)


def test_without_polish_the_model_is_told_the_samplers_own_timesteps():
    schedule, sigmas = SCHEDULES["irregular"], sigmas_of(15)
    own = 0.5 * sigmas[:-1]
    program = lower_advance(collapse(forecast_table(schedule), sigmas), key_of(sigmas), Sampling(sigmas, own))
    np.testing.assert_allclose(program.timesteps, own, rtol=1e-6)


def test_weights_of_velocities_that_are_not_there_yet_are_dropped():
    schedule, sigmas = SCHEDULES["no warm-up"], sigmas_of(10)
    rows = np.random.default_rng(0).standard_normal((3, 3))
    full, lower = (
        lower_advance(AdvanceTable(schedule, some), key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
        for some in (rows, np.tril(rows))
    )
    assert full.digest() == lower.digest()
    np.testing.assert_allclose(full.coefficients[[0, 4, 5], 0], np.tril(rows), rtol=1e-6)


def test_the_uncached_program_computes_every_step_and_keeps_nothing():
    sigmas = sigmas_of(7)
    own = 0.5 * sigmas[:-1]
    program = lower_uncached(key_of(sigmas), Sampling(sigmas, own))
    assert program.instructions == tuple(map(Compute, range(7)))
    np.testing.assert_allclose(program.timesteps, own, rtol=1e-6)


@each_schedule
def test_a_lowered_table_with_a_bias_and_long_memory_is_the_table(schedule):
    """Every forecast looks at everything; slots are as many as there are readers."""
    num, rng = schedule.num_steps, np.random.default_rng(0)
    sigmas = sigmas_of(num)
    table = compose(rng.standard_normal((num, num)), rng.standard_normal(num), schedule, feeds_back=False)
    program, slots = lower_table(table, key_of(sigmas), Sampling(sigmas, sigmas[:-1])), {}
    features = {step: rng.standard_normal(SIZE) for step in schedule.compute}
    stacked = np.stack([features[step] for step in schedule.compute])
    for instruction in program.instructions:
        for (slot,) in instruction.writes.values():
            slots[slot] = features[instruction.steps[0]]
        for step in instruction.rows:
            got = sum(program.coefficients[step, 0, s] * slots[s] for s in instruction.reads[FEATURE]) + program.bias[step]
            np.testing.assert_allclose(got, table.rows[step] @ stacked + table.bias[step], rtol=1e-4, atol=1e-4)


@each_schedule
def test_forecasts_between_two_computed_steps_are_one_instruction(schedule):
    num = schedule.num_steps
    sigmas = sigmas_of(num)
    table = compose(np.ones((num, 1)), np.zeros(num), schedule, feeds_back=False)
    program = lower_table(table, key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
    runs = [instruction.steps for instruction in program.instructions if instruction.rows]
    assert all(run == tuple(range(run[0], run[-1] + 1)) for run in runs)
    ends = [*schedule.compute[1:], num]
    assert runs == [tuple(range(a + 1, b)) for a, b in zip(schedule.compute, ends, strict=True) if b > a + 1]


def test_a_table_knows_its_cut():
    sigmas = sigmas_of(4)
    schedule = Schedule(4, (0, 2))
    hidden = compose(np.zeros((4, 1)), np.zeros(4), schedule, feeds_back=False)
    assert lower(hidden, key_of(sigmas), Sampling(sigmas, sigmas[:-1])).cut == "hidden"
    assert lower(AdvanceTable(schedule, np.eye(2)), key_of(sigmas), Sampling(sigmas, sigmas[:-1])).cut == "output"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_slots_are_reused_when_a_method_looks_back_a_fixed_number_of_features(order):
    schedule = interval_schedule(50, 7)
    sigmas = sigmas_of(50)
    program = lower_table(Newton(order).table(schedule, sigmas, None), key_of(sigmas), Sampling(sigmas, sigmas[:-1]))
    assert program.capacity == order + 1
    assert program.compute_steps == schedule.compute


@pytest.mark.parametrize(("window", "feeds_back"), [(1, False), (3, False), (8, True)])
def test_predictor_programs_read_the_right_features_and_never_overwrite_one_in_use(window, feeds_back):
    schedule, sigmas = interval_schedule(50, 7), sigmas_of(50)
    program = lower_predictor(
        schedule, window, feeds_back=feeds_back, key=key_of(sigmas), sampling=Sampling(sigmas, sigmas[:-1])
    )
    holds = {}
    for instruction in program.instructions:
        (step,), sources = instruction.steps, instruction.reads.get(FEATURE, ())
        if not instruction.computes:
            assert tuple(holds[slot] for slot in sources) == schedule.history(step, window, feeds_back=feeds_back)
        for (slot,) in instruction.writes.values():
            assert slot not in sources
            holds[slot] = step
    assert program.capacity <= window + 1


def test_steps_run_on_the_graphs_that_the_sampling_names():
    sigmas = np.linspace(1, 0, 7)
    sampling = Sampling(sigmas, sigmas[:-1], graphs=(COMPUTE,) * 2 + (EXPERT,) * 4)
    program = lower_uncached(key_of(sigmas), sampling)
    assert [one.graph for one in program.instructions] == list(sampling.graphs)
    assert Sampling.of_program(program).graphs == sampling.graphs
    assert sampling.first(2).graphs == (COMPUTE,) * 2
    schedule = Schedule(6, (0, 3))
    moved = lower(AdvanceTable(schedule, np.tri(2)), key_of(sigmas), sampling)
    assert [one.graph for one in moved.instructions if one.computes] == [COMPUTE, EXPERT]
    table = Newton(1).table(schedule, sigmas, None)
    with pytest.raises(InputError, match="made by the tail of one transformer, and the model has two"):
        lower(table, key_of(sigmas), sampling)
