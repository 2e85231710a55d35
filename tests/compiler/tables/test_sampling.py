"""Programs of any sampler of diffusers, beside its own loop.

``P`` prompts, ``T`` steps; latents [P, L, D].
"""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from samplers import EULER, MULTISTEP, STEPS
from toy_calibration import CHANNELS, TOKENS, make_evaluator

from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.sampler_probe import probe_sampler
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import VELOCITY
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas

COMPUTED = (0, 2, 3, 6)
REFUSED = {"sample": "nothing is left of the noise", "IPNDMScheduler": "does not say its noise levels"}
INEXACT = ("EDM", "Euler", "LMS")  # which begin with a little less than unit noise


def make_scheduler(name, options, told):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(**(told or {"num_inference_steps": STEPS}))
    return scheduler


def own_loop(scheduler, noise, answer):
    """``answer(step, x)``: the model's output [P, …] at what the scheduler hands it."""
    x = torch.from_numpy(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for step, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(answer(step, scale(x, t).numpy()))
        x = scheduler.step(output[:, None], t, x[:, None], return_dict=False)[0][:, 0]  # solvers want channels
    return x.numpy()


def key_of(sampling):
    return ProgramKey(sampling.num_steps, hash_sigmas(sampling.sigmas), {})


def close(got, wanted, tolerance):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.fixture(scope="module")
def evaluator():
    return make_evaluator()


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, TOKENS, CHANNELS)), {"prompt": rng.standard_normal((2, TOKENS, CHANNELS))}


@pytest.mark.parametrize(("name", "options", "told"), [*EULER, *MULTISTEP])
def test_programs_go_where_the_samplers_own_loop_goes(name, options, told, evaluator, given):
    noise, conditions = given
    sampler = probe_sampler(make_scheduler(name, options, told))
    times = np.linspace(1, 0.1, len(sampler.timesteps)).astype(np.float32)
    refused = [text for part, text in REFUSED.items() if part in (name, options.get("prediction_type"))]
    if refused:
        with pytest.raises(InputError, match=refused[0]):
            Sampling.of(sampler, times)
        return
    sampling = Sampling.of(sampler, times)
    assert (sampling.euler is None) == ((name, options, told) in MULTISTEP)

    def whole(step, x):
        return evaluator.evaluate(x, float(times[step]), conditions)[0]

    def play(program):
        again = Program.from_json(program.to_json(), program.arrays())
        return evaluator.play(again, noise, conditions)

    for guided in (False, True):
        uncached = lower_uncached(replace(key_of(sampling), guided=guided), sampling)
        np.testing.assert_allclose(
            Sampling.of_program(uncached).moves, sampling.moves, rtol=1e-5, atol=1e-5 * sampling.moves.max()
        )
    wanted = own_loop(make_scheduler(name, options, told), noise, whole)
    tolerance = 1e-3 if name.startswith(INEXACT) else 2e-5
    close(play(lower_uncached(key_of(sampling), sampling)), wanted, tolerance)
    everything = Schedule(sampling.num_steps, tuple(range(sampling.num_steps)))
    close(play(lower(AdvanceTable(everything, sampling.moves[1:]), key_of(sampling), sampling)), wanted, tolerance)
    _check_hidden_forecasts(evaluator, sampling, make_scheduler(name, options, told), given, play, tolerance)
    _check_answers_outside(evaluator, sampling, make_scheduler(name, options, told), given, play, tolerance)


def _check_hidden_forecasts(evaluator, sampling, scheduler, given, play, tolerance):
    """Reuse of features: the sampler's own loop with the tail of the newest one."""
    noise, conditions = given
    rows = np.zeros((sampling.num_steps, len(COMPUTED)))
    for step in set(range(sampling.num_steps)) - set(COMPUTED):
        rows[step, sum(one < step for one in COMPUTED) - 1] = 1.0
    kept = []

    def answer(step, x):
        t = float(sampling.timesteps[step])
        if step not in COMPUTED:
            return evaluator.tail(kept[-1], t, conditions)
        velocity, feature = evaluator.evaluate(x, t, conditions)
        kept.append(feature)
        return velocity

    schedule = Schedule(sampling.num_steps, COMPUTED)
    program = lower(ForecastTable.of_rows(schedule, rows), key_of(sampling), sampling)
    close(play(program), own_loop(scheduler, noise, answer), tolerance)


def _check_answers_outside(evaluator, sampling, scheduler, given, play, tolerance):
    """The sampler's own loop on what a program of the output cut answers it ends where the program ends."""
    noise, conditions = given
    rng, kept = np.random.default_rng(1), []
    ends = [*COMPUTED[1:], sampling.num_steps]
    reuse = np.repeat(np.eye(len(COMPUTED)), np.diff([*COMPUTED, sampling.num_steps]), axis=0)
    rows = np.tril(sampling.moves[ends] @ reuse * rng.uniform(0.9, 1.1, 2 * [len(COMPUTED)]))
    program = lower(AdvanceTable(Schedule(sampling.num_steps, COMPUTED), rows), key_of(sampling), sampling)
    assert set(program.slots) == {VELOCITY}

    def answer(step, x):
        if step in COMPUTED:
            kept.append(evaluator.evaluate(x, float(sampling.timesteps[step]), conditions)[0])
        row = program.rows_out[step, 0, : len(kept)]
        return np.tensordot(row.astype(np.float64), np.stack(kept), 1)

    close(own_loop(scheduler, noise, answer), play(program), tolerance)
