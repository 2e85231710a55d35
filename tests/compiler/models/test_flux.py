"""FLUX pipelines: their files, their thin twins, and what is said of prompts that are cut."""

import json
import shutil
import threading
from contextlib import nullcontext

import pytest
import torch

from cachec.compiler.models import MODELS, TINY_FLUX_DIR, find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.runtime.errors import ModelUnavailableError

WEIGHTS = "diffusion_pytorch_model.safetensors"

LONG = (
    "a laughing person with brown skin , short blue hair and a long beard in a red cardigan on a yellow background "
    "who blinks and turns up left"
)


@pytest.fixture(scope="module")
def model():
    return load_model(MODELS["tiny-flux"], with_transformer=False)


def encode(model, prompts, text_tokens):
    settings = Settings(height=128, width=128, text_tokens=text_tokens, guidance=3.5, steps=4, dtype="float32")
    return model.encode(prompts, settings, ["encoder_hidden_states"])


def test_a_prompt_that_is_cut_is_named_with_what_is_lost_once(model, caplog):
    for _ in range(2):
        encode(model, ["a sad face", LONG, LONG], 24)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cachec")]
    assert said.startswith("prompt 'a laughing person with brown skin , short blue hair")
    assert "is cut at 24 text tokens, without 'blinks and turns up left': shorten it" in said


def test_so_is_one_that_only_the_pooled_text_encoder_cuts(model, caplog):
    encode(model, [LONG[2:]], 64)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cachec")]
    assert "the pooled text encoder reads 28 tokens only, not 'left'" in said


def test_the_pipelines_own_words_are_not_repeated(model, caplog):
    encode(model, [LONG[4:]], 24)
    assert not [record for record in caplog.records if "was truncated" in record.getMessage()]
    model.pipeline.encode_prompt(prompt=LONG[4:], prompt_2=None, max_sequence_length=24)
    assert [record for record in caplog.records if "was truncated" in record.getMessage()]


def test_a_prompt_that_fits_is_not_spoken_of(model, caplog):
    encode(model, ["a sad face with short blue hair"], 24)
    assert not caplog.records


def test_a_thin_twin_has_a_block_of_each_kind_and_leaves_the_model_alone():
    model = load_model(MODELS["tiny-flux"])
    settings, state = Settings(128, 128, 24, 3.5, 4, "bfloat16"), torch.get_rng_state()
    twin, small = model.thin_twin(settings)
    assert torch.equal(torch.get_rng_state(), state)
    config = twin.transformer.config
    assert (config.num_layers, config.num_single_layers, config.num_attention_heads) == (1, 1, 2)
    assert config.guidance_embeds == model.io.conditions.__contains__("guidance")
    assert twin.example_inputs(small)["hidden_states"].shape == (2, 6, config.in_channels)
    assert small.dtype == "bfloat16"
    assert model.pipeline.transformer is None  # nothing of it was loaded


@pytest.fixture
def directory(tmp_path):
    """tiny-flux in a directory of its own, with links for its weights."""
    shutil.copytree(TINY_FLUX_DIR, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in TINY_FLUX_DIR.glob("*/*.safetensors"):
        (tmp_path / "m" / path.parent.name / path.name).symlink_to(path)
    return tmp_path / "m"


def test_weights_of_another_precision_beside_the_models_are_not_taken(directory):
    known = load_model(MODELS["tiny-flux"]).weights_hash
    (directory / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of another precision")
    assert load_model(find_model(str(directory))).weights_hash == known


def test_weights_are_hashed_beside_other_work_with_the_same_result(directory):
    known, model = load_model(MODELS["tiny-flux"]).weights_hash, load_model(find_model(str(directory)))
    with model.hashing_weights():
        assert [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]
        assert model.weights_hash == known
    weights = directory / "transformer" / WEIGHTS
    for hashed in (nullcontext, type(model).hashing_weights):
        model = load_model(find_model(str(directory)))
        moved = weights.rename(weights.with_suffix(".moved"))
        with hashed(model), pytest.raises(ModelUnavailableError, match="the weights of .* cannot be read: No such file"):
            _ = model.weights_hash
        moved.rename(weights)


def test_weights_that_changed_in_memory_are_not_those_of_the_files(directory):
    loaded = load_model(find_model(str(directory)))
    pipeline = loaded.pipeline
    assert loaded.transformer is pipeline.transformer  # loads it
    wrapped = type(loaded).wrap(loaded.spec, pipeline, directory)
    assert wrapped.weights_hash == loaded.weights_hash
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1
    changed = type(loaded).wrap(loaded.spec, pipeline, directory)
    assert changed.weights_hash != loaded.weights_hash


def test_what_is_wrong_with_weights_that_are_not_there_is_said(directory):
    folder = directory / "transformer"
    weights = (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model-00002-of-00003.safetensors")
    with pytest.raises(ModelUnavailableError, match=r"model-00001-of-00003.safetensors is missing, and 1 more: download it"):
        load_model(find_model(str(directory)))
    weights.unlink()
    with pytest.raises(ModelUnavailableError, match=r"of the weights of .*, .*/transformer has none: download them"):
        load_model(find_model(str(directory)))
    (folder / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(
        ModelUnavailableError, match=r"has only diffusion_pytorch_model.bin, and cachec reads safetensors: save"
    ):
        load_model(find_model(str(directory)))


def test_an_index_without_its_map_or_a_shard_that_is_missing_is_named(directory):
    index = directory / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ModelUnavailableError, match="index.json is damaged: it has no weight_map"):
        load_model(find_model(str(directory)))
    index.write_text(json.dumps({"weight_map": {"proj_out.bias": "part-2.safetensors"}}))
    with pytest.raises(ModelUnavailableError, match="part-2.safetensors cannot be read: No such file"):
        load_model(find_model(str(directory)))
