import numpy as np
import pytest
from toy_calibration import make_calibration

from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.bns import Bns
from cachec.compiler.methods.gram import Gram, polish_round, schedule_facts
from cachec.compiler.methods.gram_fit import fit_rows, node_timesteps, polish
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

STEPS = 12
FOUR = Schedule(STEPS, (0, 2, 5, 8))


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


def test_without_polish_it_is_the_closed_form_and_says_what_it_was_fitted_to(calibration):
    parameters = Gram(polish=0).calibrate(calibration, FOUR)
    assert set(parameters.arrays) == {"rows"}
    assert parameters.origin == "the toy's runs"
    assert parameters.facts == {
        "method": "gram",
        "steps": "12",
        "schedule": "0,2,5,8",
        "num_prompts": "6",
        "target": "uncached run",
    }
    table = Gram(polish=0).table(FOUR, calibration.sigmas, parameters)
    np.testing.assert_array_equal(table.coefficients, fit_rows(calibration, FOUR).coefficients)
    assert table.timesteps is None


def test_a_fit_to_a_fine_reference_says_so():
    calibration = make_calibration(num_steps=4, fine_steps=STEPS, fine=True)
    assert Gram(polish=0).calibrate(calibration, FOUR).facts["target"] == "fine reference"


def test_rows_are_fitted_to_all_prompts_and_polished_on_the_first(monkeypatch):
    monkeypatch.setattr("cachec.compiler.methods.gram.FIRST_PROMPTS", 3)
    monkeypatch.setattr("cachec.compiler.methods.gram.POLISH_PROMPTS", 4)
    monkeypatch.setattr("cachec.compiler.methods.gram.MIN_POLISH_PROMPTS", 9)
    calibration = make_calibration(9)
    parameters = Gram(polish=2).calibrate(calibration, FOUR)
    assert parameters.arrays["rows"].dtype == parameters.arrays["timesteps"].dtype == np.float64
    table = Gram().table(FOUR, calibration.sigmas, parameters)
    expected = polish(calibration.select(range(3)), fit_rows(calibration, FOUR), rounds=1)
    expected = polish(calibration.select(range(4)), expected, rounds=1)
    np.testing.assert_array_equal(table.coefficients, expected.coefficients)
    np.testing.assert_array_equal(table.timesteps, expected.timesteps)
    assert decibels(calibration.errors(table)) > decibels(calibration.errors(fit_rows(calibration, FOUR)))


def test_it_does_not_polish_on_too_few_prompts_nor_too_many_steps_and_says_so(caplog, monkeypatch):
    assert set(Gram(polish=2).calibrate(make_calibration(15), FOUR).arrays) == {"rows"}
    assert caplog.messages == ["fitted on 15 prompts, not polished: that takes 16"]
    monkeypatch.setattr("cachec.compiler.methods.gram.MAX_POLISHED", 3)
    assert set(Gram(polish=2).calibrate(make_calibration(16), FOUR).arrays) == {"rows"}
    assert caplog.messages[1].startswith("4 computed steps are not polished")


def test_its_draft_is_not_polished_and_its_brief_fit_for_a_round():
    assert Gram(polish=7).draft() == Gram(polish=0).brief() == Gram(polish=0) == Gram(times="free").draft()
    assert Gram(polish=7).brief() == Gram(polish=1)


@pytest.mark.parametrize("polish", [0, 1, 2])
def test_a_brief_fit_is_finished_as_one_made_at_once(polish, monkeypatch):
    monkeypatch.setattr("cachec.compiler.methods.gram.FIRST_PROMPTS", 12)  # of 16: rounds of different prompts
    runs, rounds, real = make_calibration(16), [], polish_round
    monkeypatch.setattr("cachec.compiler.methods.gram.polish_round", lambda *given: (rounds.append(given[-1]), real(*given))[1])
    method = Gram(polish)
    finished = method.finish(runs, FOUR, method.brief().calibrate(runs, FOUR))
    assert rounds == list(range(polish))  # none is made twice
    wanted = method.calibrate(runs, FOUR)
    assert finished.facts == wanted.facts
    for name, values in wanted.arrays.items():
        np.testing.assert_array_equal(finished.arrays[name], values)


@pytest.mark.parametrize("method", [Gram(), Bns()], ids=["gram", "bns"])
def test_rows_of_another_schedule_or_none_are_refused(calibration, method):
    facts = schedule_facts(method.name, calibration, FOUR)
    fitted = Parameters({"rows": np.zeros((4, 4))}, facts, "a file")
    assert method.table(FOUR, calibration.sigmas, fitted).schedule == FOUR
    for schedule in (Schedule(STEPS, (0, 2, 5, 9)), Schedule(STEPS, (0, 2, 5)), Schedule(20, FOUR.compute)):
        with pytest.raises(PredictorError, match=f"rows of {method.name} were fitted to steps 0,2,5,8 of 12, wanted"):
            method.table(schedule, calibration.sigmas, fitted)
    with pytest.raises(PredictorError, match=f"{method.name} needs rows fitted to calibration runs: give --calibration"):
        method.table(FOUR, calibration.sigmas, None)
    with pytest.raises(PredictorError, match=f"a file holds no rows of {method.name} for 4 computed steps"):
        method.table(FOUR, calibration.sigmas, Parameters({"rows": np.zeros((3, 3))}, facts, "a file"))


def test_free_times_are_told_in_order_and_bring_the_next_node_nearer(calibration):
    usual, free = fit_rows(calibration, FOUR), fit_rows(calibration, FOUR, free_times=True)
    own = node_timesteps(calibration, FOUR)
    assert (free.timesteps != own).any()
    assert (np.diff(free.timesteps) < 0).all()
    assert np.abs(free.timesteps / own - 1).max() <= 0.08 + 1e-9

    def error(table, told):
        """Of the node that the first one leads to, by hand."""
        velocity = calibration.velocities(calibration.noise(), float(told), 0)
        x = calibration.sampling.shares[2] * (calibration.noise() + table.coefficients[0, 0] * velocity)
        return np.square(x - calibration.latents(2)).sum()

    assert error(free, free.timesteps[0]) < error(usual, own[0])
    assert free.timesteps[0] < own[0]
    assert polish(calibration, free, rounds=1).timesteps[0] not in (own[0], free.timesteps[0])
    assert polish(calibration, usual, rounds=1).timesteps[0] == own[0]
    assert set(Gram(polish=0, times="free").calibrate(calibration, FOUR).arrays) == {"rows", "timesteps"}


def test_a_negative_polish_and_unknown_times_are_refused():
    with pytest.raises(InputError, match="polish is -1"):
        Gram(polish=-1)
    with pytest.raises(InputError, match="times is 'any'; what the model is told at first is sampler or free"):
        Gram(times="any")
