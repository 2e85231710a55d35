import json
import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from reference.avatars import clips as clip_files
from reference.avatars import dataset
from reference.avatars.attributes import Look, is_held_out, vocabulary
from reference.avatars.motion import BLINK, CHANGE, CLIP_WORDS, FRAMES, MOTIONS, MOVES, OPEN_EYES, Clip, clips
from reference.avatars.render import Pose

LOOK = Look("angry", "dark", "spiky", "ginger", "", "jacket", "orange", "navy")


@pytest.mark.parametrize("motion", MOVES)
def test_a_move_goes_from_one_end_to_the_other_and_nothing_else_changes(motion):
    field, first, last = MOVES[motion]
    frames = Clip(LOOK, motion, "angry").frames(Pose(scale=1.02))
    places = [getattr(pose, field) for _, pose, _ in frames]
    assert (places[0], places[-1]) == (first, last)
    assert places == sorted(places, reverse=last < first)
    assert {(look, replace(pose, **{field: 0.0}), eyes) for look, pose, eyes in frames} == {(LOOK, Pose(scale=1.02), "wide")}


def test_eyes_close_and_open_again():
    eyes = [found for _, _, found in Clip(LOOK, "blinks", "angry").frames(Pose())]
    assert [i for i, found in enumerate(eyes) if found == "humble"] == list(range(*BLINK))
    assert len(eyes) == FRAMES


def test_a_mood_changes_in_the_middle():
    frames = Clip(LOOK, "becomes", "laughing").frames(Pose())
    assert [look.mood for look, _, _ in frames] == ["angry"] * CHANGE + ["laughing"] * (FRAMES - CHANGE)
    assert frames[-1][2] == "bow"


def test_clips_stay_on_their_side_of_the_split_with_both_moods():
    for held_out in (True, False):
        found = list(islice(clips(1, held_out=held_out), 60))
        assert all(is_held_out(clip.look) == held_out for clip in found)
        assert all(is_held_out(replace(clip.look, mood=clip.mood)) == held_out for clip in found)
        assert all(clip.look.mood in OPEN_EYES for clip in found if clip.motion == "blinks")
    assert {clip.motion for clip in islice(clips(2, held_out=False), 200)} == set(MOTIONS)


def test_captions_say_what_happens_in_known_words_that_fit():
    rng, words = np.random.default_rng(0), set(vocabulary())
    for clip in islice(clips(3, held_out=True), 60):
        caption = clip.caption(rng)
        found = re.findall(r"\w+|[^\w\s]+", caption)
        assert caption.endswith(clip.words)
        assert set(found) <= words
        assert len(found) < CLIP_WORDS


def test_clips_are_read_as_they_were_written(monkeypatch, tmp_path):
    def draw(lines, to, *, script, side):
        with to.open("ab") as file:
            file.writelines(bytes([json.loads(line)["tilt"] >= 0] * (side * side * 3)) for line in lines)

    monkeypatch.setattr(dataset, "install", lambda folder: folder / "render.mjs")
    monkeypatch.setattr(dataset, "render", draw)
    clip_files.write("held-out-clips", 3, tmp_path)
    frames, shown, captions = clip_files.load("held-out-clips", tmp_path)
    assert frames.shape == (3, FRAMES, 96, 96, 3)
    assert shown == list(islice(clips(22, held_out=True), 3))
    assert [caption.endswith(clip.words) for caption, clip in zip(captions, shown, strict=True)] == [True] * 3
