"""Training on the toy: recorded, fitted, with all facts; and what cannot be trained."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from toy_model import SETTINGS, ToyModel

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.methods.hyca import HyCa
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.methods.training import Training, record_for_training, train_predictor, training_facts
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError

PROMPTS = UsedPrompts(("a circle", "a ring", "a cross", "a star"), ("stop", "fit", "fit", "fit"))
SCHEDULE = Schedule(4, (0, 1))


@dataclass(frozen=True)
class Counting(Taylor):
    """Trained by looking at what it is given."""

    needs_training = True

    def fit(self, data):
        return {"features": data.train.features.mean(axis=0)}, {"held_out": len(data.held_out.noise), "steps": data.seed}


TRAINING = Training(Counting(), SCHEDULE, SETTINGS, PROMPTS, seed=3, interval=2)


def test_a_method_is_trained_on_prompts_to_fit_on_and_stopped_by_others(toy_split, tmp_path):
    model = ToyModel()
    evaluator = GraphEvaluator(toy_split, model.io)
    parameters = train_predictor(model, evaluator, TRAINING, work=tmp_path / "work")
    assert parameters.arrays["features"].shape == (4, *np.asarray(model.example_inputs(SETTINGS)["latents"]).shape[1:])
    facts = parameters.facts
    assert facts["held_out"] == "1"
    assert {name: facts[name] for name in ("seed", "num_prompts", "interval", "model")} == {
        "seed": "3",
        "num_prompts": "4",
        "interval": "2",
        "model": "toy",
    }
    known = training_facts(model, TRAINING.method, SCHEDULE, SETTINGS)
    assert {name: facts[name] for name in known if name != "steps"} == {n: v for n, v in known.items() if n != "steps"}
    with pytest.raises(InputError, match="work holds an unfinished training with other settings"):
        train_predictor(model, evaluator, replace(TRAINING, seed=4), work=tmp_path / "work")
    assert json.loads((tmp_path / "work" / "training.json").read_text())["seed"] == "3"


def test_what_others_recorded_is_not_run_again(toy_split, tmp_path, monkeypatch):
    model = ToyModel()
    evaluator = GraphEvaluator(toy_split, model.io)
    record_for_training(model, recording_here(Subject.of(model, SETTINGS), evaluator), TRAINING, work=tmp_path / "work")
    monkeypatch.setattr(evaluator, "evaluate", None)
    parameters = train_predictor(model, evaluator, TRAINING, work=tmp_path / "work")
    assert parameters.arrays["features"].shape[0] == SETTINGS.steps


def test_options_that_do_not_fit_the_features_are_refused_before_anything_is_recorded(toy_split, tmp_path, monkeypatch):
    model = ToyModel()
    evaluator = GraphEvaluator(toy_split, model.io)
    monkeypatch.setattr(evaluator, "evaluate", None)
    training = replace(TRAINING, method=HyCa(clusters=1000))
    with pytest.raises(InputError, match=f"clusters is 1000, above the {evaluator.feature[-1]} channels of a feature"):
        train_predictor(model, evaluator, training, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": Taylor()}, PredictorError, "method 'taylor' has nothing to train: compile it as it is"),
        ({"schedule": Schedule(2, (0, 1))}, InputError, "there is nothing for taylor to forecast, so nothing to train"),
        ({"prompts": PROMPTS.only("fit")}, InputError, "3 prompts are too few to train on some and to stop by others"),
    ],
    ids=["untrained", "all computed", "prompts"],
)
def test_what_cannot_be_trained_is_refused(change, error, message):
    assert TRAINING.check() == Counting()
    with pytest.raises(error, match=message):
        replace(TRAINING, **change).check()


def test_facts_are_what_a_predictor_must_fit():
    facts = training_facts(ToyModel(), Lesa(), SCHEDULE, SETTINGS)
    assert facts["schedule"] == "0,1"
    assert set(facts) == {
        "method", "weights_sha256", "steps", "schedule", "sigmas", "height", "width", "text_tokens", "guidance"
    }  # fmt: skip
