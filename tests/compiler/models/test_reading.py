"""How pipelines read prompts: tokens without transformers, and conditions that are the pipeline's own."""

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.compiler.models.reading import PROBE, Reading, _of_bytes
from cachec.pictures.tokens import TokenFacts, TokenReader
from cachec.runtime.errors import InputError

SETTINGS = Settings(height=32, width=48, text_tokens=24, guidance=3.0, steps=4, dtype="float32")


def test_tokens_of_bytes_are_those_of_the_tokenizer_in_python():
    tokenizer = ByT5Tokenizer()
    facts = TokenFacts("t", "ids", "mask", length=40, pad=0, blank=True)
    reader = TokenReader(facts, _of_bytes(tokenizer))
    for text in ("a red ring", "Ærø — “é” \t\n", 'Text "stop". ', "x" * 60):
        wanted = tokenizer(text, padding="max_length", max_length=40, truncation=True, return_tensors="np")
        found = reader.read([text])
        np.testing.assert_array_equal(found["ids"], wanted["input_ids"])
        np.testing.assert_array_equal(found["mask"], wanted["attention_mask"])
    assert not reader.read([""])["mask"].any()


@pytest.fixture(scope="module")
def model(saved_family):
    return load_model(find_model(str(saved_family("pixart-sigma"))), with_transformer=False)


def test_what_a_pipeline_does_to_prompts_is_seen(model):
    (reader,) = model.reading(SETTINGS).readers
    facts = reader.facts
    assert (facts.tokenizer, facts.length, facts.cleaning, facts.before, facts.after) == (
        "tokenizer", 24, ("lower", "strip"), "", "",
    )  # fmt: skip


def test_conditions_of_tokens_are_the_pipelines_own(model):
    reading = model.reading(SETTINGS)
    for prompt in (PROBE, "", "a ring " * 40):
        tokens = {name: torch.from_numpy(ids) for reader in reading.readers for name, ids in reader.read([prompt]).items()}
        with torch.no_grad():
            made = reading.conditions(tokens)
        wanted = model.encode([prompt], SETTINGS, model.io.conditions)
        assert made.keys() == wanted.keys()
        for name, value in made.items():
            np.testing.assert_allclose(value.numpy(), wanted[name], atol=1e-6)


def test_what_changes_prompts_in_an_unknown_way_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model.pipeline), "_text_preprocessing", lambda self, texts, **_: [text[::-1] for text in texts])
    with pytest.raises(InputError, match="changes prompts before it reads them, in a way that is not known"):
        _ = Reading(model, SETTINGS).readers


def test_prompts_that_come_with_pictures_are_refused(saved_family):
    model = load_model(find_model(str(saved_family("flux-kontext"))), with_transformer=False)
    with pytest.raises(InputError, match="reads a picture with its prompt"):
        model.reading(SETTINGS)
