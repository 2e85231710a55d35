"""Sizes and numbers of steps by name."""

import pytest

from cachec.runtime.errors import InputError
from cachec.runtime.variants import PictureSize, Variant, find_variant


def variant(width, height, steps):
    return Variant({"width": width, "height": height, "steps": steps}, {}, {})


VARIANTS = [variant(*one) for one in ((64, 128, 20), (64, 128, 8), (96, 64, 20), (96, 64, 8))]


@pytest.mark.parametrize(
    ("text", "size"),
    [("832x480", PictureSize(832, 480)), (" 832X480x81", PictureSize(832, 480, 81)), ("8x8x1", PictureSize(8, 8))],
)
def test_sizes_are_width_by_height_by_frames(text, size):
    assert PictureSize.parse(text) == size
    assert PictureSize.parse(str(size)) == size


@pytest.mark.parametrize("text", ["", "832", "832x", "0x64", "64x64x64x64", "64*64", "-64x64", "64.5x64"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="is not of the form WIDTHxHEIGHT"):
        PictureSize.parse(text)


@pytest.mark.parametrize(("size", "steps", "place"), [(None, None, 0), ("96x64", None, 2), (None, 8, 1), ("96X64", 8, 3)])
def test_variants_are_found_and_the_first_is_the_default(size, steps, place):
    assert find_variant(VARIANTS, size, steps) == place


@pytest.mark.parametrize(
    ("size", "steps", "message"),
    [
        ("64x96", None, "size is 64x96, but the bundle was compiled for 64x128, 96x64: .* --size 64x128,96x64,64x96"),
        ("96x64", 9, "steps is 9, but the bundle was compiled for 20, 8: .* --steps 20,8,9"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(size, steps, message):
    with pytest.raises(InputError, match=message):
        find_variant(VARIANTS, size, steps)
