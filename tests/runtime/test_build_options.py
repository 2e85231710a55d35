"""What can be asked of a builder."""

import pytest

from cachec.runtime.build_options import BuildOptions, SizeRange, in_words, shape_range
from cachec.runtime.errors import InputError
from cachec.runtime.specs import TensorSpec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 6}, "the optimization level is 6; it must be from 0 to 5"),
        ({"level": -1}, "the optimization level is -1; it must be from 0 to 5"),
        ({"workspace": 0}, "the workspace is 0 bytes; it must be above 0"),
        ({"compatibility": "ampere"}, "unknown hardware compatibility 'ampere'. Did you mean 'ampere-plus'"),
        ({"strip": True, "version_compatible": True}, "stripped weights and version compatibility exclude each other"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**options)


def test_what_is_given_is_what_differs_and_others_can_be_taken_out():
    options = BuildOptions(level=5, strip=True, compatibility="none")
    assert options.given() == {"level", "strip"}
    assert options.only({"level"}) == BuildOptions(level=5)
    assert in_words(options.given()) == "optimization level, stripped weights"


def test_shapes_have_the_ranges_of_their_sizes():
    spec = TensorSpec("latents", ("batch", 4), "float32")
    assert shape_range(spec, {"batch": SizeRange(1, 2, 3)}) == ((1, 4), (2, 4), (3, 4))
    with pytest.raises(InputError, match="input 'latents' has the size 'batch', for which no range is given"):
        shape_range(spec, {})


def test_ranges_do_not_decrease():
    with pytest.raises(InputError, match="from 1 over 3 to 2"):
        SizeRange(1, 3, 2)
