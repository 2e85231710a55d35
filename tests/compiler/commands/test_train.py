"""``cachec train`` on the toy: killed, and ending by itself."""

import json

import numpy as np
import pytest
from toy_product import killed, succeed

from cachec.compiler.methods import lesa_training
from cachec.compiler.methods.parameters import load_predictor


@pytest.fixture
def training(toy_directory, toy_training):
    return ["train", toy_directory, *toy_training]


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_result(tmp_path, training, toy_predictor):
    killed(*training, "-o", tmp_path / "killed", at="cachec.compiler.methods.lesa_training:LesaTrainer._save*3", cwd=tmp_path)
    assert not (tmp_path / "killed").exists()
    succeed(*training, "-o", tmp_path / "killed")
    first, second = load_predictor(toy_predictor), load_predictor(tmp_path / "killed")
    assert first.facts["updates"] == second.facts["updates"]
    for name, tensor in first.arrays.items():
        np.testing.assert_allclose(tensor, second.arrays[name], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed"]


def test_a_training_that_stops_improving_ends_by_itself(tmp_path, training, monkeypatch):
    monkeypatch.setattr(lesa_training, "PATIENCE", (1, 1))
    monkeypatch.setattr(lesa_training, "RATES", (0.0, 0.0))  # nothing can improve
    succeed(*[a for a in training if a not in ("--set", "max_rounds=3")], "-o", tmp_path / "p")
    curve = json.loads(load_predictor(tmp_path / "p").facts["curve"])
    assert [point["phase"] for point in curve] == [0, 0, 0, 1, 1, 1, 1]
