"""Training LESA on the calibration toy: it helps, and goes on from a checkpoint as if nothing had happened."""

import numpy as np
import pytest
from toy_calibration import make_calibration, raw_runs

from cachec.compiler.calibration.runs import Trajectories
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.lesa_training import LesaTrainer
from cachec.compiler.tables.schedule import Schedule

STEPS = 8


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(8, STEPS)


@pytest.fixture
def data(calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("cachec.compiler.methods.lesa.HIDDEN", 8)
    _, features = raw_runs(calibration)
    noise = calibration.noise().astype(np.float32)
    single = Trajectories(
        noise,
        calibration.latents(STEPS).astype(np.float32),
        features.reshape(8, STEPS, *noise.shape[1:]).astype(np.float32),
        calibration.all_conditions(),
        np.arange(noise.shape[1]),
    )
    train, held_out = (single.select(np.array(index)) for index in (range(6), (6, 7)))
    return TrainingData(
        SingleEvaluator(calibration), calibration.sampling, train, held_out, Schedule(STEPS, (0, 1, 4)), 0, tmp_path
    )


class SingleEvaluator:
    """The toy's evaluator in float32, as models are."""

    device = "cpu"

    def __init__(self, calibration):
        self._inner = calibration.evaluator

    def evaluate(self, x, t, conditions):
        return tuple(value.astype(np.float32) for value in self._inner.evaluate(x.astype(np.float64), t, conditions))

    def tail(self, feature, t, conditions):
        return self._inner.tail(feature.astype(np.float64), t, conditions).astype(np.float32)


def test_training_helps_and_keeps_the_best_weights(data):
    trainer = LesaTrainer(data, max_rounds=4)
    weights = trainer.run()
    errors = [point["held_out_latent_rel_l2"] for point in trainer.state.curve]
    assert trainer.state.best == min(errors) < errors[0]
    assert set(weights) == set(trainer.predictor.state_dict())
    facts = trainer.facts()
    assert facts["num_held_out"] == "2"
    assert int(facts["updates"]) == trainer.state.updates > 0
    assert {point["phase"] for point in trainer.state.curve} == {0, 1}


def test_an_interrupted_training_goes_on_where_it_was(data, monkeypatch):
    whole = LesaTrainer(data, max_rounds=2).run()
    (data.work / "lesa.checkpoint").unlink()
    real, rounds = LesaTrainer._round, []

    def interrupted(self):
        rounds.append(self.state.round)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(LesaTrainer, "_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LesaTrainer(data, max_rounds=2).run()
    again = LesaTrainer(data, max_rounds=2)
    assert (again.state.phase, again.state.round) == (1, 0)
    for name, weights in again.run().items():
        np.testing.assert_allclose(weights, whole[name], rtol=1e-5, atol=1e-7)
