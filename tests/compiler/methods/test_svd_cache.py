"""SVD-Cache against its recursion written out, and what is refused."""

import numpy as np
import pytest
from toy_tables import SCHEDULES, SETTINGS, coded

from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.svd_cache import SvdCache, principal_directions
from cachec.runtime.errors import InputError, PredictorError


def parameters(basis):
    return Parameters({"directions": basis}, {}, "a test")


@pytest.mark.parametrize("name", ["interval 7 of 50", "irregular", "no warm-up", "one step"])
def test_it_is_its_recursion(name):
    schedule, method = SCHEDULES[name], SvdCache(beta=0.7)
    features = np.random.default_rng(0).standard_normal((schedule.num_steps, 4, 6))
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 2)))[0].T.astype(np.float32)
    got, slope, last, at = coded(method, parameters(basis), features, schedule), None, None, None
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            now = features[step] @ basis.T
            if last is not None:
                new = (now - last @ basis.T) / (step - at)
                slope = new if slope is None else 0.7 * slope + 0.3 * new
            last, at = features[step], step
            continue
        moved = np.zeros((4, 2)) if slope is None else (step - at) * slope
        np.testing.assert_allclose(got[step], last + moved @ basis, atol=1e-4, rtol=1e-4)


def test_directions_hold_the_energy_that_is_asked_for_and_leave_a_rest():
    rows = np.random.default_rng(0).standard_normal((200, 6)) * [10, 5, 1, 0.1, 0.1, 0.1]
    for energy, rank in ((0.5, 1), (0.9, 2), (0.99999, 5)):
        basis = principal_directions(rows, energy)
        np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=1e-6)
        held = np.square(rows @ basis.T).sum() / np.square(rows).sum()
        assert rank == 5 or held >= energy > np.square(rows @ basis[:-1].T).sum() / np.square(rows).sum()


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"energy": 0.0}, {"beta": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=r"energy is|beta is"):
        SvdCache(**options)


def test_directions_of_another_model_are_refused():
    with pytest.raises(PredictorError, match=r"directions \[2, 6\] are not some of those of 8 channels"):
        SvdCache().coding((4, 8), SETTINGS, parameters(np.eye(2, 6, dtype=np.float32)))
    with pytest.raises(PredictorError, match="svd-cache needs what was fitted to the model"):
        SvdCache().coding((4, 8), SETTINGS, None)
    with pytest.raises(PredictorError, match="holds no directions of svd-cache"):
        SvdCache().coding((4, 8), SETTINGS, Parameters({}, {}, "a test"))
