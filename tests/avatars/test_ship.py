"""What is put into the second distribution: predictors in float16, found again; nothing that names a path of this machine."""

import json

import click
import numpy as np
import pytest

from cachec.compiler.methods.parameters import Parameters, load_predictor, predictor_bytes
from reference.avatars import ship


def test_a_predictor_is_written_in_float16_and_named_by_what_it_is_of(tmp_path):
    facts = {"method": "disca", "model": "tiny-m", "trained_steps": "8", "trained_schedule": "0,3,5", "interval": "none"}
    known = Parameters({"rows": np.float32([[0.1, 3.0]])}, facts, "now")
    (tmp_path / "p.safetensors").write_bytes(predictor_bytes(known))
    to = ship.ship_predictor(tmp_path / "p.safetensors", tmp_path)
    assert to == tmp_path / "predictors" / "disca-tiny-m-8-3.safetensors"
    assert to.stat().st_size < (tmp_path / "p.safetensors").stat().st_size
    np.testing.assert_array_equal(load_predictor(to).arrays["rows"], np.float16([[0.1, 3.0]]))


def test_a_model_takes_the_place_of_the_one_before_and_has_its_limits(tmp_path, monkeypatch):
    made, package = tmp_path / "m", tmp_path / "package"
    made.mkdir()
    (made / "model_index.json").write_text(json.dumps({"teacher": "tiny-m"}))
    (package / "m").mkdir(parents=True)
    (package / "m" / "old.json").write_text("{}")
    assert [path.name for path in ship.ship_model(made, package).iterdir()] == ["model_index.json"]
    monkeypatch.setattr(ship, "MAX_ALL", 1)
    with pytest.raises(click.ClickException, match="are its limit"):
        ship.ship_model(made, package)
    (made / "distilled.json").write_text(json.dumps({"curve": [{"teacher": "/home/somebody/m"}]}))
    with pytest.raises(click.ClickException, match="names a path of this machine: /home/somebody/m"):
        ship.ship_model(made, package)
