"""Texts of a request at the shortest length that holds them."""

from dataclasses import replace

import numpy as np
import pytest

from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.texts import fit_texts, shortest_text, text_length, with_text_length
from cachec.runtime.variants import find_text, label_of_shapes, name_shapes, read_shapes

IO = ModelIO("x", "t", ("text", "mask", "pooled"), guidance="plain", text=("text", "mask"))


def conditions(*lengths, long=8):
    """Of one branch for each length."""
    return {
        prefix + name: value
        for prefix, length in zip(("", "negative_"), lengths, strict=False)
        for name, value in {
            "text": np.ones((2, long, 3), np.float32),
            "mask": np.arange(long)[None] < np.array([[length], [1]]),
            "pooled": np.ones((2, long), np.float32),
        }.items()
    }


@pytest.mark.parametrize(("lengths", "needed"), [((5,), 5), ((2, 6), 6), ((0,), 1)])
def test_the_longest_text_of_both_branches_counts(lengths, needed):
    assert text_length(IO, conditions(*lengths)) == needed


def test_a_mask_with_a_hole_ends_at_its_last_token():
    given = conditions(2)
    given["mask"][0, 6] = True
    assert text_length(IO, given) == 7
    assert text_length(IO, {"mask": np.zeros((1, 4), bool)}) == 0


def test_texts_are_cut_and_padded_and_the_rest_is_left():
    given = conditions(2, 3)
    short, long = (with_text_length(IO, given, length) for length in (4, 12))
    for name in ("text", "negative_text"):
        np.testing.assert_array_equal(short[name], given[name][:, :4])
        np.testing.assert_array_equal(long[name][:, :8], given[name])
        assert not long[name][:, 8:].any()
    assert long["negative_mask"].sum() == given["negative_mask"].sum()
    assert short["pooled"] is given["pooled"]


def test_what_need_not_or_cannot_be_fitted_is_left():
    given = conditions(2)
    cases = [
        (replace(IO, text=None), (4, 8), given),
        (IO, (8,), given),
        (IO, (4, 8), {"text": given["text"]}),
        (IO, (4, 8), {**given, "mask": [1]}),
    ]
    for io, lengths, value in cases:
        length, left = fit_texts(io, value, lengths)
        assert length is None
        assert left is value
    length, fitted = fit_texts(IO, given, (4,))
    assert (length, fitted["text"].shape) == (4, (2, 4, 3))


def test_the_shortest_that_holds_it():
    assert [shortest_text((512, 64, 128), needed) for needed in (0, 64, 65, 512)] == [64, 64, 128, 512]
    with pytest.raises(InputError, match="a text has 513 tokens, and the engines take up to 512"):
        shortest_text((64, 512), 513)


def test_shapes_are_named_and_read():
    name = name_shapes(["8x6", "9x6x5"], [64, 512])
    assert name == "8x6+9x6x5, 64+512 text tokens"
    assert read_shapes(name) == (("8x6", "9x6x5"), (64, 512))
    assert label_of_shapes(name) == "8x6+9x6x5-64+512"
    assert read_shapes("8x6") == (("8x6",), ())
    assert read_shapes("8x6, many text tokens") == (("8x6",), ())
    assert find_text((64, 512), None) == 512
    with pytest.raises(InputError, match=r"text-tokens is 65, but the bundle was compiled for 64, 512: take one"):
        find_text((64, 512), 65)


def test_manifests_say_which_text_has_a_mask():
    assert ModelIO.from_json(IO.to_json()).text == ("text", "mask")
    with pytest.raises(BundleError, match="does not say which input plays which part"):
        ModelIO.from_json({**IO.to_json(), "text": ["text"]})
