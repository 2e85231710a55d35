"""Training DisCa's predictor on the toy: it helps, goes on as if nothing had happened, and does not go on from NaN."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_model import SETTINGS, ToyModel

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.methods.base import BlockData
from cachec.compiler.methods.disca import Disca
from cachec.compiler.methods.disca_training import DiscaTrainer, discriminator_loss
from cachec.compiler.methods.training import Training, record_for_training, train_predictor, training_facts
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

SCHEDULE = Schedule(4, (0, 2))
METHOD = Disca(updates=30, adversarial=10, batch=4, rate=3e-3)
PROMPTS = UsedPrompts(("a circle", "a ring", "a cross", "a star"), ("stop", "fit", "fit", "fit"))


def data_in(work, **changes):
    model, generator = ToyModel(), np.random.default_rng(0)
    shape = model.example_inputs(SETTINGS)["latents"].shape[1:]
    given = {
        "model": model,
        "settings": SETTINGS,
        "device": "cpu",
        "precision": "float32",
        "sampling": model.sampling(SETTINGS),
        "states": generator.standard_normal((6, 4, *shape)).astype(np.float32),
        "branches": [{"prompt": generator.standard_normal((6, shape[-1])).astype(np.float32)} for _ in range(2)],
        "held_out": 2,
        "schedule": SCHEDULE,
        "seed": 0,
        "work": work,
    }
    return BlockData(**{**given, **changes})


def test_training_helps_and_says_what_it_did(tmp_path):
    trainer = DiscaTrainer(data_in(tmp_path), METHOD)
    weights, facts = trainer.run(), trainer.facts()
    errors = [point["held_out"] for point in json.loads(facts["curve"])]
    assert errors[15] < 0.9 * errors[0]  # at the end of the squared error alone
    assert errors[-1] < errors[0]
    assert {name: facts[name] for name in ("depth", "fusion", "updates", "num_held_out")} == {
        "depth": "2", "fusion": "joint", "updates": "30", "num_held_out": "2",
    }  # fmt: skip
    assert set(weights) == set(trainer.predictor.state_dict())


def test_the_model_itself_is_left_alone(tmp_path):
    data = data_in(tmp_path)
    before = {name: value.clone() for name, value in data.model.transformer.state_dict().items()}
    DiscaTrainer(data, METHOD).run(until=3)
    assert all(torch.equal(value, before[name]) for name, value in data.model.transformer.state_dict().items())
    assert all(parameter.grad is None for parameter in data.model.transformer.parameters())


def test_weights_that_nothing_reads_stay_as_they_are(tmp_path, monkeypatch):
    """As those of the text in a last block of two streams."""
    made = Disca.made

    def with_more(method, model):
        predictor = made(method, model)
        predictor.register_parameter("unread", torch.nn.Parameter(torch.ones(2)))
        return predictor

    monkeypatch.setattr(Disca, "made", with_more)
    weights = DiscaTrainer(data_in(tmp_path), replace(METHOD, updates=2, adversarial=2)).run()
    assert (weights["unread"] == 1).all()


@pytest.mark.parametrize("stop", [5, 33], ids=["squared error", "discriminator"])
def test_an_interrupted_training_gives_the_same_weights(tmp_path, stop):
    whole = DiscaTrainer(data_in(tmp_path / "whole"), METHOD).run()
    DiscaTrainer(data_in(tmp_path / "parts"), METHOD).run(until=stop)
    again = DiscaTrainer(data_in(tmp_path / "parts"), METHOD)
    assert again.state.update == stop
    parts = again.run()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("what", ["predictor is nan at update 0", "discriminator is nan at update 30"])
def test_a_loss_that_is_not_a_number_ends_it(tmp_path, what):
    trainer = DiscaTrainer(data_in(tmp_path), METHOD)
    part = trainer.predictor.fusions if what.startswith("predictor") else trainer._discriminator.outer
    with torch.no_grad():
        next(part.parameters()).fill_(torch.nan)
    with pytest.raises(PredictorError, match=f"the loss of the {what}, its gradient .*: train with a smaller --set"):
        trainer.run()


def test_the_hinge_is_what_is_written():
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.0])]
    assert discriminator_loss(real, fake).item() == (0 + 0.5) / 2 + (0 + 1) / 2


def test_a_sampler_that_looks_back_has_no_discriminator(tmp_path):
    rows = np.tril(np.ones((4, 5)), 1)
    rows[3] += np.arange(5) / 7  # the last step weighs earlier outputs otherwise
    data = data_in(tmp_path, sampling=Sampling(np.linspace(1, 0, 5, dtype=np.float32), np.ones(4, np.float32), rows, "Heun"))
    with pytest.raises(InputError, match="Heun looks back at earlier ones: train by the squared error alone"):
        DiscaTrainer(data, METHOD)
    DiscaTrainer(data, replace(METHOD, adversarial=0))


def test_runs_are_recorded_and_the_predictor_fits_every_schedule(toy_split, tmp_path):
    model = ToyModel()
    evaluator = GraphEvaluator(toy_split, model.io)
    training = Training(replace(METHOD, updates=1, adversarial=1), SCHEDULE, SETTINGS, PROMPTS, seed=3)
    record_for_training(model, recording_here(Subject.of(model, SETTINGS), evaluator), training, work=tmp_path)
    parameters = train_predictor(model, evaluator, training, work=tmp_path)
    wanted = training_facts(model, METHOD, Schedule(9, (0, 4)), replace(SETTINGS, steps=9))
    assert wanted.items() <= parameters.facts.items()
    assert parameters.facts["trained_schedule"] == "0,2"
