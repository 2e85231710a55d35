from itertools import islice

import numpy as np
import torch

from cachec.compiler.evaluation.probe import Probe
from reference.avatars.attributes import VALUES, Look, looks, say
from reference.avatars.motion import FRAMES, Clip
from reference.avatars.probe import (
    CLIP_HEADS,
    MOTION_WORDS,
    PICTURE_HEADS,
    UNSEEN,
    Asked,
    Trainer,
    caption_words,
    labels,
    score,
    seen,
)

LOOK = Look("sad", "light", "bald", "black", "", "tee", "red", "blue")


def test_the_hair_colour_of_bald_people_is_not_asked():
    found = labels(PICTURE_HEADS, [Asked.of_look(LOOK, ())])
    assert found["hair_colour"].tolist() == [UNSEEN]
    assert found["mood"].tolist() == [VALUES["mood"].index("sad")]


def test_only_what_the_caption_states_is_scored():
    class Says(Probe):
        def forward(self, pictures):
            sad = torch.eye(len(VALUES["mood"]))[[VALUES["mood"].index("sad")] * len(pictures)]
            return {name: sad if name == "mood" else torch.zeros(len(pictures), len(w)) for name, w in self.answers.items()}

    asked = [Asked.of_look(LOOK, ("mood", "clothes")), Asked.of_look(LOOK, ("skin",))]
    found = score(Says(PICTURE_HEADS, 32), torch.zeros(2, 3, 32, 32), asked)
    assert found == {"colours": 1.0, "parts": 0.0, "expression": 1.0, "mood": 1.0, "skin": 1.0, "clothes": 0.0}


def test_a_clip_is_asked_for_its_motion():
    clip = Clip(LOOK, "becomes", "angry")
    asked = Asked.of_clip(clip)
    assert asked.answers["motion"] == "becomes angry"
    assert "motion" in asked.stated
    assert "hair_colour" not in asked.stated
    assert labels(CLIP_HEADS, [asked])["motion"].tolist() == [MOTION_WORDS.index("becomes angry")]
    assert seen(np.zeros((2, FRAMES, 32, 32, 3), np.uint8)).shape == (2, 9, 32, 32)


def test_the_phrases_of_captions_say_what_the_captions_state():
    words, rng = caption_words(), np.random.default_rng(4)
    assert words.answers == VALUES
    for look in islice(looks(9, held_out=False), 300):
        saying = say(look, rng)
        assert words.stated(saying.caption) == {name: getattr(look, name) for name in VALUES if name in saying.stated}


def test_the_reader_learns_a_colour():
    torch.manual_seed(0)
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    pictures[1] = 255
    asked = [Asked.of_look(LOOK, ("background",)), Asked.of_look(Look(**{**vars(LOOK), "background": "pink"}), ("background",))]
    reader = Probe({"background": VALUES["background"]}, 32)
    trainer = Trainer(reader, pictures, asked, steps=40, batch=8)
    losses = [trainer.update(step) for step in range(30)]
    assert losses[-1] < 0.5 * losses[0]
