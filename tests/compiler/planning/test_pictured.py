"""Schedules chosen by pictures: the score, the candidates, and on the calibration toy which prompts do what."""

import math

import numpy as np
import pytest
from toy_calibration import make_calibration

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.gram import Gram
from cachec.compiler.planning.pictured import PictureChoice, candidates, picture_score, smooth_schedule
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

STEPS = 12
USES = [*["fit"] * 6, *["choose"] * 10]


def decode(latents):
    """Pictures [P, 4, 5, 1] of latents."""
    return 0.5 + 0.1 * latents[..., None]


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(len(USES), STEPS, uses=USES)


@pytest.fixture
def choice(calibration):
    return PictureChoice(Gram(), calibration.of("fit"), calibration.of("choose"), decode)


def test_the_score_sees_one_broken_picture_that_the_mean_hides():
    assert picture_score([40.0, 40.0]) == pytest.approx(40.0)
    assert picture_score([20.0, 60.0]) == pytest.approx(-40 * math.log10((10**-0.5 + 10**-1.5) / 2))
    sound, broken = [59.0] * 64, [*[60.0] * 63, 19.0]
    assert np.mean(broken) > np.mean(sound)
    assert picture_score(broken) < picture_score(sound)
    assert picture_score([math.inf, math.inf]) == math.inf
    assert math.isfinite(picture_score([math.inf, 50.0]))
    assert picture_score([-math.inf, 50.0]) == -math.inf


@pytest.mark.parametrize(
    ("budget", "power", "steps"), [(4, 1.0, (0, 6, 20, 34)), (4, 2.0, (0, 0, 6, 24)), (5, 1.1, (0, 3, 12, 24, 36))]
)
def test_smooth_schedules_follow_their_formula(budget, power, steps):
    u = [(i / budget) ** power for i in range(budget)]
    assert steps == tuple(round(40 * math.sin(math.pi * v / 2) ** 2) for v in u)
    assert smooth_schedule(40, budget, power) == (steps if len(set(steps)) == budget else None)


def test_candidates_are_the_searched_steps_and_smooth_ones_each_once():
    found = candidates((0, 5, 6, 11), STEPS)
    assert found[0] == (0, 5, 6, 11)
    assert len(set(found)) == len(found) > 2
    assert all(len(steps) == 4 and steps[0] == 0 and steps[-1] < STEPS and list(steps) == sorted(steps) for steps in found)
    assert candidates(found[1], STEPS) == found[1:]


def test_the_chosen_schedule_has_the_best_pictures_of_prompts_that_no_row_was_fitted_to(choice, calibration, monkeypatch):
    fitted, real = [], Gram.calibrate
    monkeypatch.setattr(
        Gram, "calibrate", lambda self, some, s: (fitted.append((self.polish, *some.index)), real(self, some, s))[1]
    )
    searched = (0, 9, 10, 11)
    chosen = choice.choose(searched)
    assert set(fitted) == {(1, 0, 1, 2, 3, 4, 5)}  # one round, by the prompts to fit on

    def score(steps):
        """By hand, on the prompts to choose by."""
        parameters = real(Gram(1), calibration.of("fit"), Schedule(STEPS, steps))
        table = Gram().table(Schedule(STEPS, steps), calibration.sigmas, parameters)
        others = calibration.select(range(6, 16))
        reached, wanted = decode(others.play(others.program(table))), decode(others.latents(STEPS))
        return -40 * np.log10(np.mean(np.mean((reached - wanted) ** 2, axis=(1, 2, 3)) ** 0.25))

    scores = {steps: score(steps) for steps in candidates(searched, STEPS)}
    assert chosen == max(scores, key=scores.get) != searched


def test_a_schedule_whose_runs_are_not_finite_is_never_chosen(choice, monkeypatch):
    real, searched = Calibration.play, (0, 9, 10)

    def play(self, program, noise=None):
        if program.compute_steps != searched and self.index[0] >= 6:
            raise InputError("the model gives NaN")
        return real(self, program, noise)

    monkeypatch.setattr(Calibration, "play", play)
    assert choice.choose(searched) == searched
