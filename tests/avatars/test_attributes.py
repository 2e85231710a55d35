import re
from dataclasses import replace
from itertools import islice

import numpy as np

from reference.avatars import attributes
from reference.avatars.attributes import CORE, MAX_WORDS, VALUES, Look, is_held_out, looks, say, vocabulary

LOOK = Look("angry", "dark", "spiky", "ginger", "long beard", "jacket", "orange", "navy")


def tokens(caption):
    return re.findall(r"\w+|[^\w\s]+", caption)


def test_a_tenth_of_the_combinations_is_held_out_and_streams_keep_to_their_side():
    drawn = [attributes.sample_look(np.random.default_rng(i), held_out=i % 2 == 0) for i in range(20)]
    assert [is_held_out(look) for look in drawn] == [i % 2 == 0 for i in range(20)]
    rng = np.random.default_rng(0)
    share = np.mean([is_held_out(Look(**{n: str(rng.choice(v)) for n, v in VALUES.items()})) for _ in range(400)])
    assert 0.05 < share < 0.16


def test_what_a_caption_may_leave_out_does_not_move_a_look_across_the_split():
    for look in islice(looks(3, held_out=True), 20):
        assert is_held_out(replace(look, skin="light", beard="", background="grey"))
        assert look.hair != "bald" or is_held_out(replace(look, hair_colour="pink"))


def test_a_stream_is_the_same_for_the_same_seed():
    assert list(islice(looks(5, held_out=False), 5)) == list(islice(looks(5, held_out=False), 5))


def test_captions_state_what_they_say_they_state():
    rng = np.random.default_rng(1)
    for look in islice(looks(7, held_out=False), 200):
        saying = say(look, rng)
        assert set(CORE) - {"hair_colour"} <= set(saying.stated)
        assert ("hair_colour" in saying.stated) == (look.hair != "bald")
        for name in set(saying.stated) - {"hair"}:
            assert set(getattr(look, name).split()) <= set(tokens(saying.caption))
        assert ("skin" in saying.stated) == ("skin" in tokens(saying.caption))
        assert ("background" in saying.stated) == ("background" in tokens(saying.caption))


def test_captions_fit_and_hold_known_words_only():
    rng, words = np.random.default_rng(2), set(vocabulary())
    for look in islice(looks(8, held_out=True), 200):
        found = tokens(say(look, rng).caption)
        assert len(found) < MAX_WORDS  # and one for the end
        assert set(found) <= words


def test_a_look_is_read_by_the_renderer_as_one_value_each():
    options = LOOK.options()
    assert options["eyes"] == ["wide"]
    assert options["hair"] == ["spiky"]
    assert options["rearHairProbability"] == 0
    assert "rearHair" not in options
    assert options["backgroundColor"] == ["26345c"]
    assert replace(LOOK, hair="bald").options()["hairProbability"] == 0
