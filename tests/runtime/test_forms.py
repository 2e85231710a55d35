import pytest

from cachec.runtime.errors import BundleError
from cachec.runtime.forms import ANY, check_form

FORM = {"name": str, "steps?": int, "sizes": {ANY: [int]}, "rows": [{"x": float}], "rest?": {}, "list?": []}
GOOD = {"name": "a", "sizes": {"batch": [1, 2]}, "rows": [{"x": 1.5, "y": None}], "other": 1, "list": [1, "a"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, r"it\.name is 1, expected text: mend it"),
        ({"steps": "4"}, r"it\.steps is '4', expected a whole number"),
        ({"steps": True}, r"it\.steps is True, expected a whole number"),
        ({"sizes": [1]}, r"it\.sizes is \[1\], expected a mapping"),
        ({"sizes": {"batch": [1, None]}}, r"it\.sizes\['batch'\]\[1\] is None, expected a whole number"),
        ({"rows": [{"x": 1.0}, {}]}, r"it\.rows\[1\] lacks 'x'"),
        ({"list": {}}, r"it\.list is \{\}, expected a list"),
        ({"name": ["y" * 999]}, r"it\.name is \['y{78}… \(1003 characters\), expected text"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(change, message):
    check_form(GOOD, FORM, "it", "mend it")
    with pytest.raises(BundleError, match=message):
        check_form({**GOOD, **change}, FORM, "it", "mend it")
