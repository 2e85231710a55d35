import numpy as np
import pytest

from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.evaluation.probe import HEADS, SIDE, load_probe, parse_caption, score_pictures
from cachec.compiler.models import MODELS
from cachec.runtime.errors import ModelUnavailableError


@pytest.mark.parametrize("use", ["train", "eval"])
def test_every_shipped_caption_parses_to_the_words_that_it_is_made_of(use):
    for caption in default_prompts("shapes", use):
        items = parse_caption(caption)
        assert items is not None, caption
        words = [f"{i.colour} striped {i.shape}" if i.texture == "striped" else f"{i.colour} {i.shape}" for i in items]
        places = [item.place for item in items]
        if len(items) == 1:
            said = f"{words[0]} at the {places[0]} on"
        else:
            relation = places[0].removesuffix(" 0")
            assert places == [f"{relation} 0", f"{relation} 1"]
            article = "an" if words[1][0] in "aeiou" else "a"
            said = f"{words[0]} {relation} {article} {words[1]} on"
        assert said in caption


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a windmill beside a canal in morning fog",
        "a large pink circle at the left on a dark background",
        "a large red circle at the left on a dark background, photographed",
        "a large red circle left of a blue ring on a dark background",
    ],
)
def test_prompts_of_another_grammar_are_not_parsed(prompt):
    assert parse_caption(prompt) is None


def draw_square(colour, centre):
    """A plain square in a colour's tone at a place, as the dataset has it."""
    tones = {"red": (0.86, 0.12, 0.14), "blue": (0.14, 0.28, 0.88), "green": (0.13, 0.66, 0.25)}
    y, x = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    inside = np.maximum(np.abs(x - centre[0]), np.abs(y - centre[1])) < 12
    return np.where(inside[..., None], tones[colour], (0.45, 0.46, 0.48)).astype(np.float32)


DRAWN = {
    "a large red square at the left on a grey background": draw_square("red", (18, 32)),
    "a large blue square at the right on a grey background": draw_square("blue", (46, 32)),
    "a large green square at the top on a grey background": draw_square("green", (32, 18)),
}


@pytest.fixture(scope="module")
def probe():
    return load_probe(MODELS["tiny-flux"].probe)


@pytest.mark.smoke
def test_the_shipped_probe_reads_drawn_pictures(probe):
    score = score_pictures(probe, np.stack(list(DRAWN.values())), list(DRAWN))
    assert score.accuracy == dict.fromkeys(HEADS, 1.0)
    assert (score.num_items, score.skipped) == (3, 0)


def test_a_wrong_picture_scores_what_it_has_right(probe):
    picture = draw_square("blue", (18, 32))
    score = score_pictures(probe, picture[None], ["a large red square at the left on a grey background"])
    assert score.accuracy == {"colour": 0.0, "shape": 1.0, "texture": 1.0, "place": 1.0}


def test_prompts_that_say_no_item_are_counted(probe):
    captions = [*DRAWN, "a fox in the snow"]
    pictures = np.stack([*DRAWN.values(), np.zeros((SIDE, SIDE, 3), np.float32)])
    score = score_pictures(probe, pictures, captions)
    assert (score.num_items, score.skipped) == (3, 1)
    assert score_pictures(probe, pictures[:1], ["a fox"]).accuracy == {}


def test_the_probe_is_small():
    assert MODELS["tiny-flux"].probe.stat().st_size < 600_000


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    (tmp_path / "probe.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "probe.safetensors", tmp_path / "missing"):
        with pytest.raises(ModelUnavailableError, match="does not hold the probe"):
            load_probe(path)
