"""DyWeight against its recursion written out, its training, and the import of released weights."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_calibration import make_calibration

from cachec.compiler.calibration.calibration import decibels
from cachec.compiler.methods.dyweight import DyWeight
from cachec.compiler.methods.dyweight_training import first_weights, train_dyweight
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

STEPS = 12
FOUR = Schedule(STEPS, (0, 2, 5, 8))
SETTINGS = {"window": 2, "updates": 30, "batch": 6, "rate": 1e-2, "decay": 0.0}
RELEASED = {3: ([[0.8766], [-0.0305, 0.9898], [-0.107, 0.8841]], [1.0172, 0.9771, 0.9864])}  # rows of NFE 3 and their scales


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


def sampled(theta, scales, nodes, velocity):
    """The released loop: the final latents, and the times that the model is told."""
    x, past, told, now = np.zeros(3), [], [], nodes[0]
    for k, following in enumerate(nodes[1:]):
        told.append(scales[k] * now)
        past.append(velocity(k))
        weights = theta[k, : k + 1]
        x = x + (following - now) * np.tensordot(weights, past, 1)
        now = now + weights.sum() * (following - now)
    return x, told


def test_the_table_is_the_released_loop():
    generator = np.random.default_rng(0)
    theta, scales = np.tril(generator.standard_normal((4, 4))), generator.uniform(0.5, 1.5, 4)
    velocities, sigmas = generator.standard_normal((4, 3)), np.linspace(1, 0, STEPS + 1) ** 2
    table = DyWeight().table(FOUR, sigmas, Parameters({"theta": theta, "scales": scales}, {}, "a test"))
    x, told = sampled(theta, scales, sigmas[[*FOUR.compute, STEPS]], lambda k: velocities[k])
    np.testing.assert_allclose(table.coefficients[-1] @ velocities, x, atol=1e-12)
    np.testing.assert_allclose(table.timesteps, told, atol=1e-12)


def test_weights_begin_as_ipndm():
    np.testing.assert_allclose(first_weights(3, 2), [[1, 0, 0], [-0.5, 1.5, 0], [0, -0.5, 1.5]])
    np.testing.assert_allclose(first_weights(4, 4).sum(axis=1), 1)


def test_training_lowers_the_loss_and_is_played_as_it_was_trained(calibration):
    def errors(theta, scales):
        arrays = {"theta": theta, "scales": scales, "levels": calibration.sampling.clock[:-1]}
        arrays["told"] = calibration.sampling.timesteps.astype(np.float64)
        table = DyWeight().table(FOUR, calibration.sampling.levels("output"), Parameters(arrays, {}, "a test"))
        return -decibels(calibration.errors(table))

    theta, scales = train_dyweight(calibration, FOUR, **SETTINGS)
    assert (np.tril(theta, -2) == 0).all()
    assert (np.triu(theta, 1) == 0).all()
    assert errors(theta, scales) < errors(first_weights(4, 2), np.ones(4)) - 1
    assert not np.allclose(scales, 1)


def test_it_calibrates_for_one_schedule(calibration):
    method = DyWeight(updates=2, batch=2)
    parameters = method.calibrate(calibration, FOUR)
    assert method.table(FOUR, calibration.sigmas, parameters).coefficients.shape == (4, 4)
    with pytest.raises(PredictorError, match="was fitted to steps 0,2,5,8, wanted 0,2,5,9"):
        method.table(Schedule(STEPS, (0, 2, 5, 9)), calibration.sigmas, parameters)


def test_a_loss_that_is_not_finite_says_so(calibration):
    broken = replace(calibration, conditions={"prompt": np.full_like(calibration.conditions["prompt"], np.nan)})
    with pytest.raises(InputError, match="dyweight: the loss is not finite at update 0"):
        train_dyweight(broken, FOUR, **SETTINGS)


def released(path, **changed):
    rows, scales = RELEASED[3]
    theta = np.zeros((3, 3), np.float32)
    for k, row in enumerate(rows):
        theta[k, k + 1 - len(row) : k + 1] = row
    phi = np.log(1 / (1 / (np.array(scales) - 0.5) - 1)).astype(np.float32)
    masks = {name: np.tril(np.ones((3, 3), bool)) for name in ("tril_mask", "win_mask")}
    save_file({"theta": theta, "phi": phi, **masks, **changed}, path)
    return [path]


def test_released_weights_are_read(tmp_path):
    found = DyWeight.read_released(released(tmp_path / "dyweight_nfe3.safetensors"), {})
    np.testing.assert_allclose(found.arrays["scales"], RELEASED[3][1], atol=1e-5)
    np.testing.assert_allclose(found.arrays["theta"][2], [0, *RELEASED[3][0][2]], atol=1e-6)
    assert found.license == "none stated"
    table = DyWeight().table(Schedule(3, (0, 1, 2)), np.array([1, 0.8, 0.4, 0]), Parameters(found.arrays, found.facts, "them"))
    now = 1 + 0.8766 * (0.8 - 1)  # shorter than the step, as its weights do not sum to one
    np.testing.assert_allclose(table.timesteps[:2], [1.0172, 0.9771 * now], atol=1e-5)
    with pytest.raises(PredictorError, match="them is for 3 computed steps, and 4 are asked for"):
        DyWeight().table(FOUR, np.linspace(1, 0, 13), Parameters(found.arrays, found.facts, "them"))
    DyWeight().check_budgets(Parameters(found.arrays, found.facts, "them"), [3])
    with pytest.raises(PredictorError, match="them is for 3 computed steps, and 8 are asked for: give --budget 3"):
        DyWeight().check_budgets(Parameters(found.arrays, found.facts, "them"), [3, 8])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"theta": np.zeros((3, 4), np.float32)}, r"theta is \[3, 4\], expected \[3, 3\]"),
        ({"extra": np.zeros(1, np.float32)}, "extra is surplus"),
    ],
)
def test_other_files_are_refused(tmp_path, changed, message):
    with pytest.raises(PredictorError, match=message):
        DyWeight.read_released(released(tmp_path / "x", **changed), {})


@pytest.mark.parametrize("name", ["updates", "batch", "window", "rate"])
def test_bad_options_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        DyWeight(**{name: 0})
