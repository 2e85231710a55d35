"""Training LESA on the calibration toy: it helps, and goes on from a checkpoint as if nothing had happened."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy import TOKENS, WIDTH
from toy_bundle import IO, split_toy
from toy_calibration import make_calibration, raw_runs

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Trajectories, run_uncached
from cachec.compiler.methods.base import TrainingData
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.lesa_training import LesaTrainer
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import BRANCHES
from cachec.runtime.program import ProgramKey, hash_sigmas

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


@pytest.mark.parametrize("few", [False, True])
def test_each_branch_of_guidance_is_trained_apart_and_plays_as_it_was_trained(few, tmp_path, monkeypatch):
    monkeypatch.setattr("cachec.compiler.methods.lesa.HIDDEN", 8)
    sigmas, rng = np.linspace(1, 0, STEPS + 1, dtype=np.float32), np.random.default_rng(0)
    sampling, evaluator = Sampling(sigmas, sigmas[:-1]), GraphEvaluator(split_toy(), replace(IO, guidance="plain"))
    noise = rng.standard_normal((8, TOKENS, WIDTH)).astype(np.float32)
    conditions = {name: rng.standard_normal((8, WIDTH)).astype(np.float32) for name in ("prompt", "negative_prompt")}
    conditions["guidance_scale"] = np.full(8, 3, np.float32)
    steps = [*run_uncached(evaluator, sampling, noise, conditions)]
    tokens = np.array([1, 4, TOKENS + 2]) if few else np.arange(2 * TOKENS)
    features = np.stack([one.feature[:, tokens] for one in steps], axis=1)
    runs = Trajectories(noise, steps[-1].latents, features, conditions, tokens)
    train, held_out = (runs.select(np.array(index)) for index in (range(6), (6, 7)))
    schedule = Schedule(STEPS, (0, 1, 4))
    method = Lesa(max_rounds=3, branches="apart", second_bound=0.4)
    arrays, facts = method.fit(TrainingData(evaluator, sampling, train, held_out, schedule, 0, tmp_path))
    assert {name.split(".")[1] for name in arrays} == set(BRANCHES)
    assert method.trained_facts(guided=True).items() <= facts.items()
    assert not Lesa(branches="shared").trained_facts(guided=True).items() <= facts.items()
    curve = [point["held_out_latent_rel_l2"] for point in json.loads(facts["curve"])]
    assert float(facts["best_held_out_latent_rel_l2"]) == min(curve) < curve[0]
    table = method.table(schedule, sigmas, Parameters(arrays, {**facts, "steps": str(STEPS)}, "trained here"))
    assert np.abs(np.diff(table.coefficients[list(schedule.forecast)], axis=1)).max() > 1e-3
    key = ProgramKey(STEPS, hash_sigmas(sigmas), {}, guided=True)
    error = evaluator.play(lower(table, key, sampling), held_out.noise, held_out.conditions) - held_out.final
    assert np.linalg.norm(error) / np.linalg.norm(held_out.final) == pytest.approx(min(curve), rel=1e-4)


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
