"""FLUX pipelines: what is said of prompts that are cut."""

import pytest

from cachec.compiler.models import MODELS, load_model
from cachec.compiler.models.base import Settings

LONG = "a large red striped circle at the left of a dark background and a small blue cross at the right"


@pytest.fixture(scope="module")
def model():
    return load_model(MODELS["tiny-flux"], with_transformer=False)


def encode(model, prompts, text_tokens):
    settings = Settings(height=64, width=64, text_tokens=text_tokens, guidance=3.5, steps=4, dtype="float32")
    return model.encode(prompts, settings, ["encoder_hidden_states"])


def test_a_prompt_that_is_cut_is_named_with_what_is_lost_once(model, caplog):
    for _ in range(2):
        encode(model, ["a red circle", LONG, LONG], 16)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cachec")]
    assert said.startswith("prompt 'a large red striped circle at the left of a dark")
    assert "is cut at 16 text tokens, without 'blue cross at the right': shorten it" in said


def test_so_is_one_that_only_the_pooled_text_encoder_cuts(model, caplog):
    encode(model, [LONG[2:]], 64)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cachec")]
    assert "the pooled text encoder reads 20 tokens only, not 'right'" in said


def test_the_pipelines_own_words_are_not_repeated(model, caplog):
    encode(model, [LONG[4:]], 16)
    assert not [record for record in caplog.records if "was truncated" in record.getMessage()]
    model.pipeline.encode_prompt(prompt=LONG[4:], prompt_2=None, max_sequence_length=16)
    assert [record for record in caplog.records if "was truncated" in record.getMessage()]


def test_a_prompt_that_fits_is_not_spoken_of(model, caplog):
    encode(model, ["a small red circle at the left on a dark background"], 16)
    assert not caplog.records
