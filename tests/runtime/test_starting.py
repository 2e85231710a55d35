"""Requests that begin later: as a sampler outside that begins there, and never with a forecast of what was not computed."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_engines import IO, SIGMAS, STEPS, load, make_engines, make_program, noise, play, prompt

from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.lower import lower_table
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session
from cachec.runtime.starting import starting_at
from cachec.runtime.stepper import Stepper

STARTS = range(1, STEPS)
TOLD = SIGMAS[:-1]


def run(program, latents):
    return Session(make_engines(), program, IO, batch=len(latents)).run(prompt(1, 2), latents)


def step_by_step(program, latents, start):
    """A sampler outside that takes Euler's steps from ``start`` on."""
    stepper, x = Stepper(make_engines(), program, IO, batch=len(latents)), latents
    stepper.begin(prompt(1, 2), first=start)
    for step in range(start, STEPS):
        x = x + np.float32(SIGMAS[step + 1] - SIGMAS[step]) * stepper.velocity(step, x)
    return x


def latents_at(start):
    """Those of the uncached run."""
    return play(UNCACHED, 1, 2)[start - 1].astype(np.float32)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cut", ["hidden", "output", UNCACHED])
def test_a_session_is_as_a_sampler_outside_that_begins_there(cut, start):
    program = make_program(cut)
    begun = starting_at(program, start)
    wanted = step_by_step(program, latents_at(start), start)
    np.testing.assert_allclose(run(begun, latents_at(start)), wanted, rtol=1e-4, atol=1e-5)
    assert begun.key == replace(program.key, start_step=start)


def test_time_steps_that_were_fitted_to_rows_go_with_the_rows():
    """Step 3 moves over a gap by the velocities of steps 2 and 3, at the times that its row is of; step 4 alone has its own."""
    program = make_program("output")
    assert starting_at(program, 1, TOLD).timesteps[[1, 2, 3]] == pytest.approx([TOLD[1], 0.97 * TOLD[2], 0.97 * TOLD[3]])
    assert starting_at(program, 3, TOLD).timesteps[[3, 4]] == pytest.approx(TOLD[[3, 4]])
    assert starting_at(program, 3, TOLD).compute_steps == tuple(range(3, STEPS))


def test_steps_are_computed_until_what_forecasts_read_is_there():
    program = make_program("hidden")  # computes 0, 2, 3, 6 and reads the last two
    assert starting_at(program, 1).compute_steps == (1, 2, 3, 6)
    assert starting_at(program, 3).compute_steps == (3, 4, 5, 6)
    assert starting_at(program, 4).compute_steps == (4, 5, 6, 7)


def test_velocities_of_the_output_cut_are_kept_for_rows_to_come():
    assert starting_at(make_program("output"), 2).compute_steps == starting_at(make_program("hidden"), 2).compute_steps


def test_guided_steps_move_by_rows_of_their_own():
    schedule, sampling = Schedule(STEPS, (0, 2, 3, 6)), Sampling(SIGMAS, TOLD)
    key = replace(make_program("hidden").key, guided=True)
    program = lower_table(Taylor(order=1).table(schedule, SIGMAS, None), key, sampling)
    begun = starting_at(program, 3)
    assert begun.compute_steps == (3, 4, 5, 6)
    for step in range(3, 7):
        share, (gain,) = begun.step_numbers((step,))
        assert begun.shares[step] == share
        np.testing.assert_array_equal(begun.moves[step], [gain, *np.zeros(begun.moves.shape[1] - 1)])
    np.testing.assert_array_equal(begun.moves[7], program.moves[7])


def test_a_loaded_bundle_begins_where_it_is_told():
    bundle = load("hidden")
    session = bundle.session(batch=2, start=4)
    assert session.program.key.start_step == 4
    assert np.isfinite(session.run(prompt(1, 2), latents_at(4))).all()
    assert bundle.session(batch=2).program is bundle.programs["default"]
    assert bundle.session(start=4, for_sampler=True).program.digest() == session.program.digest()


@pytest.mark.parametrize("start", [-1, STEPS])
def test_steps_that_are_not_there_are_refused(start):
    with pytest.raises(InputError, match=f"begins at step {start}; this program has steps 0 to {STEPS - 1}"):
        starting_at(make_program("hidden"), start)


def test_programs_that_move_latents_from_the_noise_cannot_begin_later():
    program = replace(make_program("output"), shares=np.ones(STEPS, np.float32))
    with pytest.raises(InputError, match="moves the latents from the noise of step 0, which such a request does not have"):
        starting_at(program, 3)


def test_noise_begins_at_the_first_step():
    program = make_program("hidden")
    assert starting_at(program, 0) is program
    assert np.isfinite(run(program, noise(1, 2))).all()
