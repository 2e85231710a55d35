import numpy as np
import pytest

from cachec.pictures.classes import Classes
from cachec.runtime.errors import InputError

CLASSES = Classes("class_labels", {"tench": 0, "goldfish": 1}, 1000)


def test_a_class_is_its_name_or_its_number_and_an_empty_one_is_nothing():
    np.testing.assert_array_equal(CLASSES.numbers(["goldfish", " 7 ", "", "1000"]), [1, 7, 1000, 1000])
    assert CLASSES.numbers(["0"]).dtype == np.int64
    assert Classes.from_json(CLASSES.to_json()) == CLASSES


@pytest.mark.parametrize("prompt", ["goldfsh", "1001", "-1"])
def test_what_is_no_class_is_refused(prompt):
    with pytest.raises(InputError, match="unknown class"):
        CLASSES.numbers([prompt])
