from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.evaluation.probe import CaptionWords, PictureReader, Probe, load_probe, probe_bytes
from cachec.compiler.models import MODELS
from cachec.runtime.errors import ModelUnavailableError

WORDS = CaptionWords(
    {
        "mood": {"sad": ["sad"], "angry": ["angry"]},
        "beard": {"": [""], "beard": ["beard"], "long beard": ["long beard"]},
        "skin": {"light": ["light skin"], "dark": ["dark skin"]},
    },
    ("mood",),
)


@pytest.mark.parametrize(
    ("caption", "stated"),
    [
        ("A sad face with light skin", {"mood": "sad", "skin": "light", "beard": ""}),
        ("angry, a long beard", {"mood": "angry", "beard": "long beard"}),
        ("angry, a long, beard", {"mood": "angry", "beard": "beard"}),
        ("a sad or angry face", None),
        ("a fox with a beard", None),
        ("saddest", None),
        ("", None),
    ],
)
def test_captions_state_by_whole_phrases_the_longest_first(caption, stated):
    assert WORDS.stated(caption) == stated


@pytest.mark.parametrize("use", ["train", "choose", "measure", "eval"])
def test_every_shipped_caption_can_be_checked(use):
    words = load_probe(MODELS["tiny-flux"].probe).words
    assert all(len(words.stated(caption) or ()) >= 5 for caption in default_prompts("avatars", use))


@pytest.fixture(scope="module")
def reader():
    return load_probe(MODELS["tiny-flux"].probe)


DRAWN = (
    "a sleepy face in a purple jacket with dark skin , wavy blue hair and a long beard on a navy background",
    "a surprised character in a yellow cardigan with brown skin , spiky blond hair and a moustache on a navy background",
    "a sad character with brown skin , no hair and a long beard in a black tee on a grey background",
)


@pytest.fixture(scope="module")
def drawn():
    """Held-out pictures of the data set, with their captions."""
    with Image.open(Path(__file__).parents[2] / "data" / "avatars.png") as sheet:
        return dict(zip(DRAWN, np.split(np.asarray(sheet, np.float32) / 255, len(DRAWN), axis=1), strict=True))


@pytest.mark.smoke
def test_the_shipped_probe_reads_pictures_of_the_data_set(reader, drawn):
    for caption, picture in drawn.items():
        assert reader.score(picture, caption) == dict.fromkeys(reader.words.stated(caption), True)


def test_a_wrong_picture_scores_what_it_has_right(reader, drawn):
    found = reader.score(drawn[DRAWN[0]], "a sleepy face in a red jacket with dark skin , no hair and a long beard")
    assert found == {"mood": True, "skin": True, "hair": False, "beard": True, "clothes": True, "clothes_colour": False}


def test_what_is_no_caption_is_not_asked(reader, drawn):
    assert reader.score(drawn[DRAWN[0]], "a fox in the snow") == {}


def test_the_probe_is_small():
    assert MODELS["tiny-flux"].probe.stat().st_size < 600_000


def test_a_probe_is_written_and_read_again(tmp_path):
    torch.manual_seed(0)
    probe, picture = Probe(WORDS.answers, 32).eval(), np.random.default_rng(0).random((32, 32, 3), np.float32)
    (tmp_path / "probe.safetensors").write_bytes(probe_bytes(probe, WORDS))
    again = load_probe(tmp_path / "probe.safetensors")
    assert again.words == WORDS
    assert again.read(picture) == PictureReader(probe.half().float(), WORDS).read(picture)


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    (tmp_path / "nothing.safetensors").write_bytes(b"nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("nothing.safetensors", "other.safetensors", "missing"):
        with pytest.raises(ModelUnavailableError, match="does not hold a probe"):
            load_probe(tmp_path / name)
