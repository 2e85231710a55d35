"""Schedules chosen by pictures: the score, the candidates, and on the calibration toy which prompts do what."""

import math

import numpy as np
import pytest
from toy_calibration import make_calibration

import cachec.compiler.planning.pictured as module
from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.gram import Gram
from cachec.compiler.planning.pictured import PictureChoice, candidates, picture_score, shaped_schedule
from cachec.compiler.planning.search import GramDomain
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
    ("bend", "power", "steps"),
    [(0.0, 1.0, (0, 10, 20, 30)), (1.0, 1.0, (0, 6, 20, 34)), (0.75, 1.0, (0, 7, 20, 33)), (0.0, 2.0, (0, 2, 10, 22))],
)
def test_smooth_schedules_follow_their_formula(bend, power, steps):
    assert shaped_schedule(40, 4, bend, power) == steps


def test_a_smooth_schedule_that_computes_a_step_twice_is_none():
    assert shaped_schedule(10, 9, 1.0, 1.0) is None


def test_errors_at_nodes_are_weighed_by_gap_and_noise_level(calibration):
    fit = calibration.of("fit")
    domain, steps = GramDomain(fit.velocity_gram().sum(axis=0), fit.sampling), (0, 3, 7)
    errors = domain.least_squares(steps)
    level = fit.sigmas
    nodes = errors[0] * (level[3] - level[7]) * level[3] ** 2 + errors[1] * level[7] * level[7] ** 2
    assert domain.total(errors, steps, weight=3.0, power=2.0) == pytest.approx(errors[2] + 3 * nodes)


def test_candidates_are_as_many_steps_each_once_and_begin_with_the_searched_one(calibration):
    fit, searched = calibration.of("fit"), (0, 5, 6, 11)
    found = candidates(fit, searched, seed=0)
    assert found[0] == searched
    assert len(set(found)) == len(found) > 5
    assert all(len(steps) == 4 and steps[0] == 0 and steps[-1] < STEPS and list(steps) == sorted(steps) for steps in found)


def test_the_chosen_schedule_has_the_best_pictures_of_prompts_that_no_row_was_fitted_to(choice, calibration, monkeypatch):
    fitted, real = [], Gram.calibrate
    monkeypatch.setattr(
        Gram, "calibrate", lambda self, some, s: (fitted.append((self.polish, *some.index)), real(self, some, s))[1]
    )
    searched = (0, 9, 10, 11)
    chosen = choice.choose(searched, seed=0)
    assert set(fitted) == {(0, 0, 1, 2, 3, 4, 5)}  # in closed form, by the prompts to fit on

    def score(steps):
        """By hand, on the prompts to choose by."""
        table = Gram(0).table(
            Schedule(STEPS, steps), calibration.sigmas, real(Gram(0), calibration.of("fit"), Schedule(STEPS, steps))
        )
        others = calibration.select(range(6, 16))
        reached, wanted = decode(others.play(others.program(table))), decode(others.latents(STEPS))
        return -40 * np.log10(np.mean(np.mean((reached - wanted) ** 2, axis=(1, 2, 3)) ** 0.25))

    tried = candidates(calibration.of("fit"), searched, seed=0)
    assert score(chosen) >= max(map(score, tried)) - 1e-9
    assert score(chosen) > score(searched)


def test_candidates_are_first_scored_on_the_most_sensitive_prompts_and_none_is_played_twice(choice, monkeypatch):
    scored, played, real = [], [], module._Tried.score
    monkeypatch.setattr(module._Tried, "score", lambda self, places: (scored.append(tuple(places)), real(self, places))[1])
    play = module._Tried._psnr
    monkeypatch.setattr(
        module._Tried,
        "_psnr",
        lambda self, places: (played.extend((self.program.compute_steps, p) for p in places), play(self, places))[1],
    )
    monkeypatch.setattr(module, "FIRST", 3)
    monkeypatch.setattr(module, "FINALISTS", 2)
    program = choice.program((0, 4, 8))
    order = choice.sensitive(program, choice.choosing.play(program))
    choice.choose((0, 4, 8), seed=0)
    assert sorted(order) == list(range(10))
    assert set(scored) == {tuple(order[:3]), tuple(order)}
    assert scored.count(tuple(order)) <= 2 + 1 + module.MOVES + 2
    assert len(set(played)) == len(played)


def test_a_schedule_whose_runs_are_not_finite_is_never_chosen(choice, monkeypatch):
    real, searched = Calibration.play, (0, 9, 10)

    def play(self, program, noise=None):
        if program.compute_steps != searched and self.index[0] >= 6:
            raise InputError("the model gives NaN")
        return real(self, program, noise)

    monkeypatch.setattr(Calibration, "play", play)
    assert choice.choose(searched, seed=0) == searched
