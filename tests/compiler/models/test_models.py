"""Models by name and directory, and families that are registered."""

import json

import pytest
import torch
from toy import ToyDiT
from toy_model import SETTINGS, ToyModel, ToyPipeline

import cachec
from cachec.compiler.models import find_model, load_model, wrap_pipeline
from cachec.compiler.models.base import check_prompts
from cachec.runtime.errors import InputError, ModelUnavailableError


def test_a_directory_has_the_defaults_of_its_family(toy_directory, tmp_path):
    spec = find_model(str(toy_directory))
    assert (spec.name, spec.height, spec.width, spec.guidance) == ("toy", 16, 24, 1.0)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert find_model(str(tmp_path)).text_tokens == 512


def test_a_registered_family_loads_with_and_without_its_transformer(toy_directory):
    spec = find_model(str(toy_directory))
    model = load_model(spec)
    inputs = model.example_inputs(SETTINGS)
    with torch.no_grad():
        torch.testing.assert_close(model.transformer(**inputs), ToyDiT()(**inputs))
    pictures = load_model(spec, with_transformer=False)
    assert pictures.decode(inputs["latents"].numpy(), SETTINGS).shape == (2, 16, 24, 3)
    with pytest.raises(ModelUnavailableError, match="toy was loaded without its transformer"):
        _ = pictures.transformer


def test_a_pipeline_in_memory_is_wrapped(toy_directory, toy_family):
    assert (
        wrap_pipeline(ToyPipeline(ToyDiT(), origin=str(toy_directory))).weights_hash
        == load_model(find_model(str(toy_directory))).weights_hash
    )
    assert isinstance(wrap_pipeline(ToyPipeline(ToyDiT())), ToyModel)


def test_damaged_weights_are_unavailable(toy_directory, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_bytes((toy_directory / "model_index.json").read_bytes())
    (tmp_path / "transformer/toy.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ModelUnavailableError, match="is no safetensors file, or is cut off"):
        load_model(find_model(str(tmp_path)))


def test_a_family_is_registered_once(toy_family):
    cachec.register_family("ToyPipeline", "toy_model:ToyModel")
    with pytest.raises(InputError, match="kind of pipeline 'ToyPipeline' means toy_model:ToyModel already"):
        cachec.register_family("ToyPipeline", "other:Family")


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompt given"), (["a", " "], "prompt 2 is empty")])
def test_prompts_are_there(prompts, message):
    with pytest.raises(InputError, match=message):
        check_prompts(prompts)
