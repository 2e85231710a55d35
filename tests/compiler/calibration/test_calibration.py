"""What fits read: prompts chosen and split, references, and the ways to open a calibration."""

from dataclasses import replace

import numpy as np
import pytest
from toy_calibration import make_calibration
from toy_model import SETTINGS, ToyModel

from cachec.compiler.calibration.calibration import decibels, open_calibration, relative_errors
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.statistics import record_statistics
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

PROMPTS = UsedPrompts(("a circle", "a ring", "a cross", "a star"), ("fit", "fit", "stop", "measure"))


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(9, 6)


def test_prompts_chosen_twice_are_numbered_as_they_are_then(calibration):
    some = calibration.select([8, 6, 4, 2])
    again = some.select(np.array([1, 3]))
    assert again.index.tolist() == [6, 2]
    np.testing.assert_array_equal(again.noise(), calibration.statistics.noise[[6, 2]])
    np.testing.assert_array_equal(again.all_conditions()["prompt"], calibration.conditions["prompt"][[6, 2]])
    np.testing.assert_array_equal(again.latents(3), calibration.statistics.latents[[6, 2], 2])
    np.testing.assert_array_equal(again.velocity_gram(), calibration.statistics.velocity_gram[[6, 2]])
    np.testing.assert_array_equal(again.feature_gram(), calibration.statistics.feature_gram[[6, 2]])


def test_prompts_are_chosen_by_their_use(calibration):
    fit, stop = calibration.of("fit"), calibration.of("stop")
    assert stop.index.tolist() == [3, 7]
    assert sorted([*fit.index.tolist(), *stop.index.tolist()]) == list(range(9))
    assert calibration.select([8, 7, 3]).of("stop").index.tolist() == [7, 3]
    with pytest.raises(InputError, match="calibration the toy's runs has no prompts to measure: make one with more prompts"):
        calibration.of("measure")


def test_latents_start_at_the_noise_and_end_where_the_run_does(calibration):
    np.testing.assert_array_equal(calibration.latents(0), calibration.noise())
    euler = np.tril(np.broadcast_to(np.diff(calibration.sigmas), (6, 6)))
    table = AdvanceTable(Schedule(6, tuple(range(6))), euler)
    np.testing.assert_allclose(calibration.latents(6), calibration.play(calibration.program(table)), atol=1e-6)


def test_the_fine_reference_is_on_its_own_grid():
    fine = make_calibration(3, 4, fine_steps=12, fine=True)
    assert fine.num_steps == 12
    assert fine.velocity_gram().shape == (3, 12, 12)
    np.testing.assert_array_equal(fine.latents(12), fine.statistics.fine_latents[:, -1])
    with pytest.raises(InputError, match="fit hidden-cut methods without a fine reference"):
        fine.feature_gram()


def test_errors_are_relative_and_their_mean_is_in_decibels():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    errors = relative_errors(reference + np.array([[0.5, 0.0], [0.0, 0.02]]), reference)
    np.testing.assert_allclose(errors, [0.1, 0.01], rtol=1e-5)
    assert decibels(errors) == pytest.approx((20 + 40) / 2, rel=1e-5)
    assert decibels(np.zeros(2)) == pytest.approx(240)  # no error at all is finite, too


def test_velocities_of_many_prompts_are_those_of_each(calibration, monkeypatch):
    together = calibration.velocities(calibration.noise(), 0.5, 0)
    monkeypatch.setattr("cachec.compiler.calibration.calibration.CHUNK", 4)  # 9 prompts: the last batch is smaller
    np.testing.assert_allclose(calibration.velocities(calibration.noise(), 0.5, 0), together, rtol=1e-12)
    x = calibration.noise()
    x[6] = np.inf
    x[6, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"at step 5 for prompt 7 \('prompt 6'\)"):
        calibration.velocities(x, 0.5, 5)


@pytest.fixture
def opened(toy_split):
    model = ToyModel()
    evaluator, subject = GraphEvaluator(toy_split, model.io), Subject.of(model, replace(SETTINGS, dtype="float16"))
    statistics = record_statistics(subject, recording_here(subject, evaluator), PROMPTS, reference_steps=8, seed=0, work=None)

    def make(**options):
        changed = replace(statistics, **options.pop("statistics", {}))
        return open_calibration(changed, subject, evaluator, **options)

    return make


@pytest.mark.parametrize(("fine", "steps"), [(False, 4), (True, 8)])
def test_an_opened_calibration_plays_the_run_that_was_recorded(opened, fine, steps):
    calibration = opened(fine=fine)
    assert (calibration.num_prompts, calibration.num_steps, calibration.origin) == (4, steps, "made now")
    euler = np.tril(np.broadcast_to(np.diff(calibration.sigmas), (steps, steps)))
    assert calibration.errors(AdvanceTable(Schedule(steps, tuple(range(steps))), euler)).max() < 1e-5


def test_a_fine_reference_that_was_not_recorded_is_refused(opened):
    with pytest.raises(InputError, match="has no fine reference: make one with cachec calibrate --reference-steps"):
        opened(fine=True, statistics={"fine_latents": None})
