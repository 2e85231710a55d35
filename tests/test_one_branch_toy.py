"""Steps that compute one branch of guidance alone: on real engines, beside a plain loop over the model itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_guided_toy import BATCH, RULES, SAMPLERS, engines, given, sampling_of  # noqa: F401 (fixtures)
from toy_bundle import IO, STEPS, split_toy

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.weights import Values
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.schedule import parse_schedule
from cachec.runtime.abi import COMPUTE, VELOCITY
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.plan import VELOCITY_BUFFER
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.session import Session
from cachec.runtime.starting import starting_at
from cachec.runtime.stepper import Stepper

SCHEDULE = parse_schedule("0 1 2c 3c 5 6c", STEPS)


def program(sampling, *, guided=True, schedule=SCHEDULE, method=None):
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=guided)
    method = method or Adams(2)
    return lower(method.table(schedule, sampling.levels(method.cut), None), key, sampling)


def combine(rule, negative, positive, scale):
    """As the pipelines have it."""
    apart = scale * (positive - negative)
    if rule == "extra":
        return positive + apart
    if rule == "plain":
        return negative + apart
    return (
        (negative + apart)
        * np.linalg.norm(positive, axis=-1, keepdims=True)
        / np.linalg.norm(negative + apart, axis=-1, keepdims=True)
    )


def plain_loop(one, rule, noise, conditions):
    """Latents, and how many rows the model ran on. Between computed steps the multistep solver's rows move the latents."""
    module = Values(torch.device("cpu")).module(split_toy().modules[COMPUTE])
    rows = []

    def model(x, step, prompt):
        rows.append(len(x))
        time = torch.full((len(x),), float(one.timesteps[step]))
        with torch.no_grad():
            return module(latents=torch.from_numpy(x), timestep=time, prompt=torch.from_numpy(prompt))[VELOCITY].numpy()

    x, scale, velocities, apart = noise, conditions["guidance_scale"][:, None, None], [], None
    for place, step in enumerate(SCHEDULE.compute):
        positive = model(x, step, conditions["prompt"])
        if step in SCHEDULE.conditional:
            negative = positive + apart
        else:
            negative = model(x, step, conditions["negative_prompt"])
            apart = negative - positive
        velocities.append(combine(rule, negative, positive, scale))
        row, share = one.coefficients[step, 0], 1.0 if one.shares is None else float(one.shares[step])
        x = share * noise + sum(row[i] * velocities[i] for i in range(place + 1))
    return x.astype(np.float32), sum(rows)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sessions_play_a_plain_loop(name, rule, engines, given):  # noqa: F811
    sampling, (noise, conditions) = sampling_of(name), given
    one, io = program(sampling), replace(IO, guidance=rule)
    wanted, rows = plain_loop(one, rule, noise, conditions)
    assert rows == 2 * BATCH * one.work == 2 * BATCH * SCHEDULE.work
    session = Session(engines(rule, sampling.rows is not None), one, io, batch=BATCH)
    for _ in range(2):  # nothing is left behind
        np.testing.assert_allclose(session.run(conditions, noise), wanted, atol=2e-5 * np.abs(wanted).max())
    alone = Session(engines(rule, sampling.rows is not None), one, io, batch=1)
    first = alone.run({name: value[:1] for name, value in conditions.items()}, noise[:1])
    np.testing.assert_allclose(first, wanted[:1], atol=2e-5 * np.abs(wanted).max())
    played = GraphEvaluator(split_toy(), io).play(one, noise, conditions)
    np.testing.assert_allclose(played, wanted, atol=2e-5 * np.abs(wanted).max())
    whole = program(sampling, schedule=parse_schedule("0,1,2,3,5,6", STEPS))
    both = Session(engines(rule, sampling.rows is not None), whole, io, batch=BATCH).run(conditions, noise)
    assert np.abs(both - wanted).max() > 1e-3


def test_the_model_runs_on_half_the_rows(engines, given):  # noqa: F811
    """What it takes in and gives at such a step is of B rows, and they are the positive branch's."""
    one = program(sampling_of("flow"))
    plan = Session(engines("plain", False), one, replace(IO, guidance="plain"), batch=BATCH)._binding._plan(one)
    by_step = {call.steps: call for call in plan.operations if call.engine == COMPUTE}
    assert [plan.shape(by_step[step,].inputs["latents"])[0] for step in SCHEDULE.compute] == [6, 6, 3, 3, 6, 3]
    assert by_step[2,].outputs[VELOCITY].start == BATCH
    assert by_step[2,].outputs[VELOCITY].buffer == VELOCITY_BUFFER


def test_programs_are_written_and_read():
    one = program(sampling_of("flow"))
    again = Program.from_json(one.to_json(), one.arrays())
    assert again.digest() == one.digest()
    assert (again.one_branch_steps, again.work, again.compute_steps) == ((2, 3, 6), 4.5, SCHEDULE.compute)
    with pytest.raises(BundleError, match="but is not guided, or has no rows"):
        replace(one, pair_rows=None)


def test_where_there_is_no_other_branch_or_no_pair_it_is_refused(engines):  # noqa: F811
    sampling = sampling_of("flow")
    with pytest.raises(
        InputError, match="schedule 0,1,2c,3c,5,6c computes one branch .* at step 2, but requests have no other"
    ):
        program(sampling, guided=False)
    with pytest.raises(InputError, match="at step 2, and the hidden cut both: take a method of the output cut"):
        program(sampling, method=Taylor(1))
    with pytest.raises(
        InputError, match="level default computes one branch of guidance at steps 2, 3, 6, and a sampler outside"
    ):
        Stepper(engines("plain", False), program(sampling), replace(IO, guidance="plain"), batch=1)
    with pytest.raises(InputError, match="begins at step 2, but level default computes one branch"):
        starting_at(program(sampling), 2)
    with pytest.raises(InputError, match="one branch of guidance at step 0, which has no step before it"):
        parse_schedule("0c,1", STEPS)
