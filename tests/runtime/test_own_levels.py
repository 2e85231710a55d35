"""Noise levels that no program has: what is made of those that a pipeline's call takes, and the steps over them."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy_engines import IO, KEY, SIGMAS, STEPS, load, make_engines, noise, prompt

from cachec.compiler.tables.lower import lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.errors import InputError
from cachec.runtime.own_levels import Levels, at_levels
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session

GIVEN = (1.0, 0.6, 0.2)
LEVELS, TIMES = Levels(3.0, None, 1.0, 0.0, None).of(GIVEN)
FLOW = Sampling(SIGMAS, SIGMAS[:-1])


@dataclass(frozen=True)
class Facts:
    """As much of a manifest as is looked at."""

    settings: dict = field(default_factory=dict)


def own(sampling, **key):
    """The program that computes every step of the levels, of a bundle with this sampler."""
    program = lower_uncached(replace(KEY, level=UNCACHED, **key), sampling)
    bundle = replace(load("hidden"), manifest=Facts(), programs={UNCACHED: program, "default": program})
    made = at_levels(bundle, GIVEN, LEVELS, TIMES)
    assert made.manifest.settings == {"steps": 3, "sigmas": list(GIVEN)}
    assert [one.key.level for one in made.programs.values()] == [UNCACHED, "default"]
    return made.programs["default"]


def turned(sign):
    """The sampler that is handed so many times the model's output."""
    rows = np.column_stack([np.ones(STEPS), np.tri(STEPS) * sign * np.diff(SIGMAS.astype(np.float64))])
    return Sampling(SIGMAS, SIGMAS[:-1], rows)


def test_levels_are_shifted_and_stretched_to_a_last_one():
    np.testing.assert_allclose(LEVELS, [1, 1.8 / 2.2, 0.6 / 1.4, 0], rtol=1e-6)
    levels, times = Levels(3.0, 0.02, -1000.0, 1000.0, None).of(GIVEN)
    np.testing.assert_allclose(levels, [1, 1 - 0.4 / 2.2 * 0.98 / (0.8 / 1.4), 0.02, 0], rtol=1e-6)
    np.testing.assert_allclose(times, 1000 * (1 - levels[:-1]), rtol=1e-6, atol=1e-4)
    assert Levels(**Levels(3.0, 0.02, 1.0, 0.0, 6).to_json()) == Levels(3.0, 0.02, 1.0, 0.0, 6)


def test_every_step_over_them_is_as_if_it_had_been_compiled():
    wanted = lower_uncached(own(FLOW).key, Sampling(LEVELS, TIMES))
    assert own(FLOW).digest() == wanted.digest()
    got, same = (Session(make_engines(), one, IO, batch=1).run(prompt(1), noise(1)) for one in (own(FLOW), wanted))
    np.testing.assert_array_equal(got, same)


def test_guided_requests_move_when_both_branches_are_combined():
    program = own(FLOW, guided=True)
    assert program.digest() == lower_uncached(program.key, Sampling(LEVELS, TIMES)).digest()


@pytest.mark.parametrize("guided", [False, True])
def test_outputs_that_a_family_turns_round_stay_so(guided):
    program = own(turned(-1.0), guided=guided)
    np.testing.assert_allclose(program.gain, -np.diff(LEVELS), rtol=1e-6)
    np.testing.assert_array_equal(program.carry, np.ones(3))
    if guided:
        np.testing.assert_array_equal(program.moves[:, 0], program.gain)


def scaled():
    rows = turned(1.0).rows * np.linspace(1, 0.5, STEPS)[:, None]
    return Sampling(SIGMAS, SIGMAS[:-1], rows)


def looking_back():
    rows = turned(1.0).rows.copy()
    rows[1:, 1] *= 1 + np.arange(1, STEPS)
    return Sampling(SIGMAS, SIGMAS[:-1], rows)


@pytest.mark.parametrize(
    "sampling", [scaled(), looking_back(), replace(FLOW, targets=SIGMAS[1:])], ids=["no flow", "looks back", "flow map"]
)
def test_steps_that_do_not_follow_from_noise_levels_are_refused(sampling):
    with pytest.raises(InputError, match="do not follow from noise levels alone"):
        own(sampling)
