"""Short names, and what ships for them."""

import json
from pathlib import Path

import pytest

from cachec.compiler.models import FAMILIES, find_model
from cachec.compiler.models.named import MODELS, PUBLISHED


@pytest.mark.parametrize("name", MODELS)
def test_a_short_name_stands_for_a_folder_that_ships_and_is_of_a_known_kind(name):
    spec = find_model(name)
    assert spec.name == name
    folder = Path(PUBLISHED.get(spec.source, spec.source))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] in FAMILIES
    assert spec.probe is None or spec.probe.is_file()


@pytest.mark.parametrize("folder", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_come_without_weights(folder):
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json"}
