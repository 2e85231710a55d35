import numpy as np
import pytest
from toy_calibration import make_calibration, raw_runs

import cachec.compiler.methods.gram_fit as gram_fit
from cachec.compiler.methods.gram import schedule_facts
from cachec.compiler.methods.gram_hidden import GramHidden
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

STEPS = 12
FOUR = Schedule(STEPS, (0, 2, 5, 8))


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


@pytest.mark.parametrize("schedule", [FOUR, Schedule(STEPS, (0, 10, 11)), Schedule(STEPS, (0,))], ids=str)
def test_rows_equal_lstsq_on_raw_features(calibration, schedule, monkeypatch):
    monkeypatch.setattr(gram_fit, "RIDGES", (0.0,))
    table = GramHidden().table(schedule, calibration.sigmas, GramHidden().calibrate(calibration, schedule))
    assert isinstance(table, ForecastTable)
    assert not table.bias.any()
    _, features = raw_runs(calibration)  # [P, T, E]
    for step in range(STEPS):
        past = [i for i, s in enumerate(schedule.compute) if s < step]
        row = np.zeros(len(schedule.compute))
        if step not in schedule.compute:
            design = features[:, [schedule.compute[i] for i in past]].transpose(0, 2, 1).reshape(-1, len(past))
            row[past] = np.linalg.lstsq(design, features[:, step].reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(table.rows[step], row, rtol=1e-6, atol=1e-8)


def test_a_fine_reference_has_no_features():
    with pytest.raises(InputError, match="features are recorded on the run's own steps only"):
        GramHidden().calibrate(make_calibration(num_steps=4, fine_steps=STEPS, fine=True), FOUR)


def test_rows_of_another_schedule_or_none_are_refused(calibration):
    facts = schedule_facts("gram-hidden", calibration, FOUR)
    fitted = Parameters({"rows": np.zeros((STEPS, 4))}, facts, "a file")
    assert GramHidden().table(FOUR, calibration.sigmas, fitted).schedule == FOUR
    for schedule in (Schedule(STEPS, (0, 2, 5, 9)), Schedule(20, FOUR.compute)):
        with pytest.raises(PredictorError, match="rows of gram-hidden were fitted to steps 0,2,5,8"):
            GramHidden().table(schedule, calibration.sigmas, fitted)
    with pytest.raises(PredictorError, match="gram-hidden needs rows fitted to calibration runs: give --calibration"):
        GramHidden().table(FOUR, calibration.sigmas, None)
    with pytest.raises(PredictorError, match="a file holds no rows of gram-hidden"):
        GramHidden().table(FOUR, calibration.sigmas, Parameters({}, facts, "a file"))
