import numpy as np
import pytest
from toy_calibration import make_calibration

from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.methods.bns import Bns
from cachec.compiler.methods.bns_training import train_rows
from cachec.compiler.methods.gram import Gram
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError

FOUR = Schedule(12, (0, 2, 5, 8))


def test_bns_calibrates_by_training():
    calibration, method = make_calibration(), Bns(updates=3, batch=2, rate=1e-2)
    parameters = method.calibrate(calibration, FOUR)
    assert parameters.facts["method"] == "bns"
    table = method.table(FOUR, calibration.sigmas, parameters)
    np.testing.assert_array_equal(table.coefficients, train_rows(calibration, FOUR, updates=3, batch=2, rate=1e-2))


def test_a_model_without_gradients_is_refused_by_name_before_anything_runs(monkeypatch):
    calibration = make_calibration()
    monkeypatch.setattr(type(calibration.evaluator), "differentiable", False)
    monkeypatch.setattr(type(calibration.evaluator), "evaluate_with_gradients", Evaluator.evaluate_with_gradients)
    with pytest.raises(InputError, match="bns needs gradients of the model"):
        Bns().calibrate(calibration, FOUR)


def test_its_draft_is_gram_without_polish():
    assert Bns().draft() == Gram(polish=0)


@pytest.mark.parametrize("name", ["updates", "batch", "rate"])
def test_bad_options_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        Bns(**{name: 0})
