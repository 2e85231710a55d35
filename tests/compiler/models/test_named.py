"""Short names, and what ships for them."""

import json
from pathlib import Path

import pytest

from cachec.compiler.models import FAMILIES, find_model, outline_model
from cachec.compiler.models.base import Settings
from cachec.compiler.models.distribution import SOURCE
from cachec.compiler.models.named import MODELS, PUBLISHED


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if not spec.source.startswith(SOURCE)])
def test_a_short_name_stands_for_a_folder_that_ships_and_is_of_a_known_kind(name):
    spec = find_model(name)
    assert spec.name == name
    folder = Path(PUBLISHED.get(spec.source, spec.source))
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] in FAMILIES
    assert spec.probe is None or spec.probe.is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_come_without_weights_and_are_enough_to_know_a_model(name):
    assert {path.suffix for path in PUBLISHED[name].rglob("*") if path.is_file()} == {".json"}
    model = outline_model(name)
    spec = model.spec
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, 2, "bfloat16", spec.frames)
    inputs = model.example_inputs(settings)
    assert model.described.get_submodule(model.block) is not None
    assert set(inputs) == {model.io.latents, model.io.timestep, *model.io.conditions}
    assert not model.constants(settings).get("return_dict")  # equal modules take none
