"""Numbers of a program for requests that begin later, against the method itself, played step by step without instructions."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from numpy_engines import IO, KEY, SIGMAS, STEPS, compute, load, make_engines, noise, prompt, tail

from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.foca import FoCa
from cachec.compiler.methods.freqca import FreqCa
from cachec.compiler.methods.hicache import HiCache
from cachec.compiler.methods.newton import Newton
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.spectrum import Spectrum
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.lower import lower, with_starts
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import BundleError
from cachec.runtime.program import Program
from cachec.runtime.session import Session
from cachec.runtime.starting import starting_at
from cachec.runtime.stepper import Stepper

SCHEDULE = Schedule(STEPS, (0, 1, 2, 5))
FLOW = Sampling(SIGMAS, SIGMAS[:-1])
HIDDEN = (Taylor(1), Newton(2), FoCa(), HiCache(1), Spectrum())


def scaled():
    """A sampler of Euler's kind that keeps another share of the latents at every step, as DDIM does."""
    rows, now = np.zeros((STEPS, 1 + STEPS)), np.eye(1, 1 + STEPS)[0]
    for step in range(STEPS):
        now = (1 + 0.05 * step) * now
        now[1 + step] += -0.1 - 0.01 * step
        rows[step] = now
    return Sampling(SIGMAS, SIGMAS[:-1], rows)


def make(method, sampling=FLOW, schedule=SCHEDULE, **key):
    def lowered(one):
        return lower(method.table(one, sampling.levels(method.cut), None), replace(KEY, **key), sampling)

    program = with_starts(lowered, schedule, sampling)
    return Program.from_json(json.loads(json.dumps(program.to_json())), program.stored())


def velocity(x, step, kept=None):
    """The model's velocity at a step, and its feature; with a feature it is that of the tail alone."""
    given = prompt(1, 2)["prompt"].astype(np.float64)
    if kept is not None:
        return tail(kept, 1 + 0.2 * given), kept
    made = compute(x, np.zeros(len(x)), 3 * float(SIGMAS[step]) + given, given)
    return made["velocity"], made["feature"]


def run(program, latents):
    return Session(make_engines(), program, IO, batch=2).run(prompt(1, 2), latents)


@pytest.mark.parametrize("start", range(1, STEPS))
@pytest.mark.parametrize("method", HIDDEN, ids=lambda one: one.name)
def test_features_are_forecast_as_the_method_does_from_there_on(method, start):
    begun = starting_at(make(method), start)
    computed = (start, *(step for step in SCHEDULE.compute if step > start))
    assert begun.compute_steps == computed
    table, x, features = method.table(SCHEDULE.after(start), SIGMAS, None), noise(1, 2).astype(np.float64), []
    for step in range(start, STEPS):
        now = None if step in computed else np.tensordot(table.rows[step, : len(features)], np.stack(features), 1)
        moved, feature = velocity(x, step, now)
        features += [feature] if step in computed else []
        x = x + float(SIGMAS[step + 1] - SIGMAS[step]) * moved
    np.testing.assert_allclose(run(begun, noise(1, 2)), x, rtol=1e-4, atol=1e-5)


def test_taylor_is_its_recursion_over_what_the_request_computed():
    begun, x, last, slope = starting_at(make(Taylor(1)), 1), noise(1, 2).astype(np.float64), None, 0.0
    for step in range(1, STEPS):
        if step in (1, 2, 5):
            moved, feature = velocity(x, step)
            slope = 0.0 if last is None else (feature - last[1]) / (step - last[0])
            last = step, feature
        else:
            moved, _ = velocity(x, step, last[1] + (step - last[0]) * slope)
        x = x + float(SIGMAS[step + 1] - SIGMAS[step]) * moved
    np.testing.assert_allclose(run(begun, noise(1, 2)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [Newton(2), FoCa(), FoCa("recursive"), Reuse(), Adams(2)], ids=lambda one: one.name)
def test_methods_without_a_warm_up_are_as_on_the_shorter_schedule(method):
    """So that nothing reaches back before the beginning."""
    start, shorter = 2, Schedule(STEPS - 2, (0, 1, 3))
    whole, alone = (
        method.table(one, levels, None)
        for one, levels in ((Schedule(STEPS, (0, 1, 3, 5)).after(start), SIGMAS), (shorter, SIGMAS[2:]))
    )
    rows = whole.coefficients if method.cut == "output" else whole.coefficients[start:]
    np.testing.assert_allclose(rows, alone.coefficients, atol=1e-12)


@pytest.mark.parametrize("start", range(1, STEPS))
@pytest.mark.parametrize("sampling", [FLOW, scaled()], ids=["flow", "scaled"])
def test_velocities_lead_where_the_method_leads_from_there_on(sampling, start):
    """In a session, and beside a sampler outside that begins there."""
    begun = starting_at(make(Adams(2), sampling), start)
    schedule, x, kept = SCHEDULE.after(start), noise(1, 2), []
    rows = Adams(2).table(schedule, sampling.clock, None).coefficients
    for place, step in enumerate(schedule.compute):
        now = sampling.shares[step] * (x / sampling.shares[start] + sum(rows[place - 1, i] * one for i, one in enumerate(kept)))
        kept.append(velocity(now, step)[0])
    wanted = sampling.shares[STEPS] * (x / sampling.shares[start] + np.tensordot(rows[-1], np.stack(kept), 1))
    np.testing.assert_allclose(run(begun, noise(1, 2)), wanted, rtol=1e-4, atol=1e-5)
    stepper, (carry, gain) = Stepper(make_engines(), begun, IO, batch=2), sampling.euler
    stepper.begin(prompt(1, 2))
    for step in range(start, STEPS):
        x = np.float32(carry[step]) * x + np.float32(gain[step]) * stepper.velocity(step, x)
    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*HIDDEN, FreqCa("fft", 0.5), Adams(2)], ids=lambda one: one.name)
def test_no_more_is_computed_than_without_the_numbers(method):
    program = make(method)
    plain = replace(program, starts={})
    counts = [[len(starting_at(one, start).compute_steps) for start in range(1, STEPS)] for one in (program, plain)]
    assert all(own <= other for own, other in zip(*counts, strict=True))
    assert sum(counts[0]) < sum(counts[1])


def test_one_branch_of_guidance_may_be_computed_behind_the_beginning():
    program = make(Adams(2), schedule=Schedule(STEPS, (0, 2, 3, 4, 6), (2, 3, 6)), guided=True)
    begun = starting_at(program, 2)  # where one branch is computed in whole runs
    assert begun.compute_steps == (2, 3, 4, 6)
    assert begun.one_branch_steps == (3, 6)
    last = starting_at(program, 7)
    assert last.one_branch_steps == ()
    assert last.pair_rows is None


def test_samplers_that_look_back_have_no_such_numbers():
    rows = np.tri(STEPS, 1 + STEPS)
    rows[:, 1:] *= -0.1 * (1 + np.arange(STEPS)) * (1 + np.arange(STEPS)[:, None] % 2)
    assert not make(Newton(1), Sampling(SIGMAS, SIGMAS[:-1], rows)).starts


def test_a_loaded_bundle_plays_them():
    bundle, program = load("hidden"), make(Taylor(1))
    bundle = replace(bundle, programs={**bundle.programs, "default": program})
    assert bundle.session(start=3).program.compute_steps == (3, 5)
    stepper, x = bundle.session(batch=2, start=3, for_sampler=True), noise(1, 2)
    stepper.begin(prompt(1, 2))
    for step in range(3, STEPS):
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * stepper.velocity(step, x)
    wanted = bundle.session(batch=2, start=3).run(prompt(1, 2), noise(1, 2))
    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)


def test_files_hold_what_differs_and_no_more():
    program = make(Taylor(1))
    lengths = {step: {name: len(row) for name, row in one.rows.items()} for step, one in program.starts.items()}
    assert lengths == {step: {} if step == 1 else {"coefficients": STEPS - step} for step in range(1, STEPS)}
    again = Program.from_json(program.to_json(), program.stored())
    assert again.digest() == program.digest() != replace(program, starts={}).digest()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, arrays: data["starts"]["3"].update(more=1), "start step '3' says .*more"),
        (lambda data, arrays: data["starts"].update(three={}), "does not read as a program"),
        (lambda data, arrays: arrays.update({"start.3.sigmas": SIGMAS}), r"the file of numbers says .*start\.3\.sigmas"),
        (lambda data, arrays: data["starts"].pop("3"), r"start\.3\.coefficients"),
        (lambda data, arrays: data["starts"]["3"]["instructions"].append("text"), "from step 3 on"),
        (lambda data, arrays: data["starts"]["3"]["instructions"].pop(), "program covers steps"),
        (lambda data, arrays: arrays.update({"start.3.coefficients": SIGMAS[None, None]}), "coefficients is"),
    ],
)
def test_files_that_are_none_are_refused(damage, message):
    program = make(Taylor(1))
    data, arrays = copy.deepcopy(program.to_json()), dict(program.stored())
    damage(data, arrays)
    with pytest.raises(BundleError, match=message):
        starting_at(Program.from_json(data, arrays), 3)
