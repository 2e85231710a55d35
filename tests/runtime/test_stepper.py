"""Velocities for a sampler outside, on engines of numpy."""

import numpy as np
import pytest
from numpy_engines import IO, SHAPE, SIGMAS, STEPS, compute, load, make_engines, make_program, noise, play, prompt

from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import VELOCITY
from cachec.runtime.device import Host
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.stepper import Stepper

CUTS = ("hidden", "output", UNCACHED)


def euler(stepper, *seeds, edits=None):
    """Latents after each step."""
    stepper.begin(prompt(*seeds))
    x, latents = noise(*seeds), []
    for step in range(STEPS):
        x = x + np.float32((edits or {}).get(step, 0))
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * stepper.velocity(step, x)
        latents.append(x)
    return latents


def make_stepper(cut, batch=1, **options):
    return Stepper(make_engines(**options), make_program(cut), IO, batch=batch)


@pytest.mark.parametrize("cut", CUTS)
def test_a_sampler_outside_comes_to_the_same_latents(cut):
    stepper = load(cut).session(batch=2, for_sampler=True, level="default")
    assert stepper.latent_shape == (2, *SHAPE)
    inside = load(cut).session(batch=2).run(prompt(1, 2), noise(1, 2))
    np.testing.assert_allclose(euler(stepper, 1, 2)[-1], inside, atol=1e-5)
    np.testing.assert_allclose(euler(stepper, 1, 2)[-1], inside, atol=1e-5)  # used again
    np.testing.assert_allclose(inside, play(cut, 1, 2)[-1], atol=1e-5)


@pytest.mark.parametrize("cut", CUTS[:2])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_edits_of_latents_between_steps_survive(cut, step):
    """At a computed step the model sees them; in a gap they stay what they are."""
    edit = {step: np.arange(12.0).reshape(SHAPE) / 12}
    plain, edited = (euler(make_stepper(cut), 1, edits=edits) for edits in (None, edit))
    ends = range(STEPS) if cut == "hidden" else [1, 2, 5, 7]  # where a gap ends, its mean velocity has brought it there
    for end in ends:
        if end >= step:
            np.testing.assert_allclose(edited[end], play(cut, 1, edits=edit)[end], atol=1e-5)
    if step == 7:
        np.testing.assert_allclose(edited[-1], plain[-1] + np.float32(edit[7]), atol=1e-6)


@pytest.mark.parametrize("cut", CUTS[:2])
@pytest.mark.parametrize("done", [1, 5, 6])
def test_a_request_that_is_dropped_halfway_leaves_nothing(cut, done):
    stepper = make_stepper(cut)
    stepper.begin(prompt(2))
    for step in range(done):
        stepper.velocity(step, noise(2))
    np.testing.assert_array_equal(euler(stepper, 1)[-1], euler(make_stepper(cut), 1)[-1])


EVERY = Schedule(STEPS, tuple(range(STEPS)))


@pytest.mark.parametrize("program", [make_program(UNCACHED), make_program("output", schedule=EVERY)])
def test_programs_that_compute_every_step_may_be_begun_anywhere(program):
    whole, late = (Stepper(make_engines(), program, IO) for _ in range(2))
    whole.begin(prompt(1))
    wanted = [whole.velocity(step, noise(step)) for step in range(STEPS)]
    late.begin(prompt(1), first=5)
    assert late.next_step == 5
    np.testing.assert_array_equal([late.velocity(step, noise(step)) for step in range(5, STEPS)], wanted[5:])


def model(step, latents, *, told=None):
    """What the model answers at a step that is computed."""
    shift = 3 * float(SIGMAS[step] if told is None else told) + prompt(1)["prompt"]
    return compute(latents, np.zeros(1), shift, prompt(1)["prompt"])["velocity"]


def told(cut, step):
    return make_program(cut).timesteps[step]


@pytest.mark.parametrize(("cut", "first", "computed"), [
    ("hidden", 1, (1, 2, 3, 6)),  # 4 and 5 are forecast from 2 and 3, 7 from 3 and 6
    ("hidden", 3, (3, 4, 5, 6)),
    ("hidden", 4, (4, 5, 6, 7)),
    ("output", 3, (3, 4, 5)),  # and 6 is handed out as the mean of its gap, from 3 and 6
])  # fmt: skip
def test_where_a_request_begins_late_what_forecasts_lack_is_computed(cut, first, computed):
    stepper = make_stepper(cut)
    stepper.begin(prompt(2))
    for step in range(STEPS):  # another request, whose slots must not count
        stepper.velocity(step, noise(9))
    stepper.begin(prompt(1), first=first)
    for step in range(first, STEPS):
        velocity, wanted = stepper.velocity(step, noise(step)), model(step, noise(step), told=told(cut, step))
        assert np.allclose(velocity, wanted, atol=1e-6) == (step in computed), step


@pytest.mark.parametrize("cut", CUTS)
def test_any_time_can_be_computed_and_leaves_the_slots_alone(cut):
    stepper = make_stepper(cut)
    stepper.begin(prompt(1))
    for step in range(4):
        stepper.velocity(step, noise(step))
    kept = {kind: buffer.copy() for kind, buffer in stepper.slots.items()}
    np.testing.assert_allclose(stepper.compute(0.47, noise(5)), model(0, noise(5), told=0.47), atol=1e-6)
    assert stepper.next_step == 4
    for kind, buffer in stepper.slots.items():
        np.testing.assert_array_equal(buffer, kept[kind])
    for step in range(4, STEPS):  # 4 and 5 up to the next computed step, and on the output cut all
        velocity = stepper.velocity(step, noise(step))
        is_computed = np.allclose(velocity, model(step, noise(step), told=told(cut, step)), atol=1e-6)
        assert is_computed == (step < 7 or cut != "hidden"), step


@pytest.mark.parametrize("first", [STEPS, -1])
def test_a_request_begins_at_a_step_of_the_program(first):
    stepper = make_stepper("hidden")
    stepper.begin(prompt(1), first=0)
    with pytest.raises(InputError, match=f"the request begins at step {first}; this program has steps 0 to 7"):
        stepper.begin(prompt(2), first=first)
    assert stepper.next_step == 0


@pytest.mark.parametrize("cut", CUTS)
def test_conditions_may_be_exchanged_between_computed_steps(cut):
    """What is computed from then on answers to the new ones."""
    stepper, other = make_stepper(cut), make_stepper(cut)
    stepper.begin(prompt(1))
    other.begin(prompt(2))
    for step in range(2):
        stepper.velocity(step, noise(step)), other.velocity(step, noise(step))
    stepper.exchange(prompt(2))
    assert stepper.next_step == 2
    got, wanted = (one.velocity(2, noise(2)) for one in (stepper, other))
    if cut == "output":  # the gap's mean velocity looks back as well
        got, wanted = (one.slots[VELOCITY][1] for one in (stepper, other))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("cut", CUTS[:2])
def test_velocities_are_copies_that_later_steps_leave_alone(cut):
    stepper = make_stepper(cut)
    stepper.begin(prompt(1))
    kept = [stepper.velocity(step, noise(step)) for step in range(STEPS)]
    first = [one.copy() for one in kept]
    stepper.begin(prompt(2))
    for step in range(STEPS):
        stepper.velocity(step, noise(9))
    assert all(np.array_equal(a, b) for a, b in zip(kept, first, strict=True))
    assert len({one.ctypes.data for one in kept}) == STEPS


def test_what_is_handed_out_may_take_a_share_of_what_came_in():
    program = make_program("output")
    share = np.linspace(0.1, 0.8, STEPS, dtype=np.float32)
    object.__setattr__(program, "share_out", share)
    plain, mixed = make_stepper("output"), Stepper(make_engines(), program, IO)
    for stepper in (plain, mixed):
        stepper.begin(prompt(1))
    for step in range(STEPS):
        wanted = plain.velocity(step, noise(step)) + share[step] * noise(step)
        np.testing.assert_allclose(mixed.velocity(step, noise(step)), wanted, atol=1e-6)


def test_steps_are_taken_in_order():
    stepper = make_stepper("hidden")
    with pytest.raises(InputError, match=r"step 0 was asked for, but no step is next: .* after begin\(\)"):
        stepper.velocity(0, noise(1))
    stepper.begin(prompt(1))
    with pytest.raises(InputError, match="step 1 was asked for, but step 0 is next"):
        stepper.velocity(1, noise(1))
    stepper.velocity(0, noise(1))
    with pytest.raises(InputError, match="step 0 was asked for, but step 1 is next"):
        stepper.velocity(0, noise(1))
    assert stepper.next_step == 1
    stepper.begin(prompt(1))
    assert stepper.next_step == 0


@pytest.mark.parametrize(
    ("latents", "message"),
    [(noise(1)[:, :2], "has shape .* compiled for height 3, width 4"), (noise(1) * np.nan, "'latents' holds NaN")],
)
def test_latents_that_do_not_fit_change_nothing(latents, message):
    stepper, other = make_stepper("hidden"), make_stepper("hidden")
    for one in (stepper, other):
        one.begin(prompt(1))
    with pytest.raises(InputError, match=message):
        stepper.velocity(0, latents)
    np.testing.assert_array_equal(stepper.velocity(0, noise(1)), other.velocity(0, noise(1)))
    with pytest.raises(InputError, match="conditions are .'prompt'., got"):
        stepper.begin({})
    assert stepper.next_step == 1


def test_engines_without_velocities_are_not_for_a_sampler_outside():
    with pytest.raises(InputError, match="a sampler outside needs velocities.*compile the bundle without --no-velocities"):
        make_stepper("hidden", velocities=False)
    assert make_stepper("output", velocities=False).next_step is None


class BesideHost(Host):
    beside_host = True


def broken_after(sigma):
    """A model whose velocities are infinite from a noise level on; ``shift`` is three times what it is told."""

    def broken(latents, delta, shift, prompt):
        made = compute(latents, delta, shift, prompt)
        late = (shift - prompt).max() / 3 <= sigma
        return {name: value / 0 if late else value for name, value in made.items()}

    return broken


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cut", CUTS[:2])
def test_a_velocity_that_is_not_finite_is_not_handed_out(cut):
    stepper = make_stepper(cut, compute=broken_after(0.3))  # the last computed step, 6
    stepper.begin(prompt(1))
    for step in range(6):
        stepper.velocity(step, noise(1))
    with pytest.raises(EngineError, match="level default: the velocities hold NaN or infinity at step 6. Take another level"):
        stepper.velocity(6, noise(1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_beside_the_host_only_the_last_step_is_looked_at():
    stepper = make_stepper("hidden", compute=broken_after(0.3), device=BesideHost())
    stepper.begin(prompt(1))
    for step in range(7):
        stepper.velocity(step, noise(1))
    with pytest.raises(EngineError, match="the velocities hold NaN or infinity at step 7"):
        stepper.velocity(7, noise(1))
