import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cachec.pictures.tokens import POOLED, TEXT, TokenFacts, TokenReader, tell_of_loss
from cachec.runtime.errors import BundleError, InputError

WORDS = ("<pad>", "</s>", "a", "red", "blue", "ring", "say", ":")


@pytest.fixture(scope="module")
def source():
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made.to_str()


def facts(**given):
    return TokenFacts(**{"tokenizer": "t", "ids": "ids", "mask": "mask", "length": 5, "pad": 0, **given})


def test_texts_are_padded_or_cut_to_their_length(source):
    read = TokenReader(facts(), source).read(["a red ring", "", "a red blue red blue ring"])
    np.testing.assert_array_equal(read["ids"], [[2, 3, 5, 1, 0], [1, 0, 0, 0, 0], [2, 3, 4, 3, 1]])
    np.testing.assert_array_equal(read["mask"], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def test_a_prompt_is_cleaned_and_stands_in_its_template(source):
    reader = TokenReader(facts(before="say : ", after=" ring", special=False, cleaning=("lower", "strip")), source)
    np.testing.assert_array_equal(reader.read(["  A Red "])["ids"], [[6, 7, 2, 3, 5]])


def test_half_of_a_surrogate_pair_is_no_text(source):
    with pytest.raises(InputError, match=r"the text has '\\ud83d' at place 2, which is no character"):
        TokenReader(facts(), source).read(["a \ud83d"])


def test_what_is_lost_is_the_end_that_no_encoder_sees(source):
    assert TokenReader(facts(), source).lost("a red blue ring") == ""
    assert TokenReader(facts(), source).lost("a red blue red blue ring") == "blue ring"
    assert TokenReader(facts(before="say : ", after=" ring"), source).lost("a red blue red") == "blue red"


def test_a_loss_is_told_once_and_only_where_it_counts(source, caplog):
    quiet, loud = TokenReader(facts(), source), TokenReader(facts(tells=TEXT, told_length=5), source)
    told = set()
    for _ in range(2):
        tell_of_loss(["a red blue red blue ring", "a ring"], [quiet, loud], told)
    (record,) = caplog.records
    assert "is cut at 5 text tokens, without 'blue ring'" in record.message
    tell_of_loss(["a a a a a a"], [TokenReader(facts(tells=POOLED, told_length=5), source)], told)
    assert "pooled text encoder reads 5 tokens only" in caplog.records[-1].message


@pytest.mark.parametrize("wrong", [{"length": 10**12}, {"length": 0}, {"pad": -1}, {"told_length": 10**40}])
def test_numbers_that_no_tokenizer_has_are_refused(wrong):
    with pytest.raises(BundleError, match=f"{next(iter(wrong))} of the tokenizer 't' is -?[0-9]+, expected"):
        TokenFacts.from_json({**facts().to_json(), **wrong})


def test_facts_survive_json():
    made = facts(before="x", cleaning=("strip",), tells=TEXT)
    assert TokenFacts.from_json({**made.to_json(), "file": "other"}) == made


@pytest.mark.parametrize("text", ["{}", "no json"])
def test_a_broken_tokenizer_is_refused(text):
    with pytest.raises(BundleError, match="the tokenizer t cannot be read"):
        TokenReader(facts(), text).read(["x"])


def test_an_unknown_cleaning_is_refused(source):
    with pytest.raises(BundleError, match="which this cachec does not know"):
        TokenReader(facts(cleaning=("translate",)), source).read(["x"])
