"""Messages: short whatever they are about, and with what to do."""

import pytest

from cachec.runtime import errors
from cachec.runtime.errors import (
    CachecError,
    InputError,
    MissingExtraError,
    cannot_be_pickled,
    in_one_line,
    need,
    shortened,
    unknown_name,
)


def test_kinds_have_exit_codes_of_their_own_or_their_parents():
    known = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CachecError)]
    kinds = [kind for kind in known if "exit_code" in vars(kind)]
    assert set(known) - set(kinds) == {errors.NotFiniteError}
    assert len({kind.exit_code for kind in kinds}) == len(kinds) > 9
    assert not {0, 2} & {kind.exit_code for kind in kinds}


@pytest.mark.parametrize(
    ("value", "said"),
    [("a\nb", r"'a\nb'"), (12, "12"), ("x" * 78, f"'{'x' * 78}'"), ("x" * 99, f"'{'x' * 79}… (101 characters)")],
)
def test_values_are_cut(value, said):
    assert shortened(value) == said


def test_errors_of_libraries_become_one_line():
    assert in_one_line(ValueError("it\n  broke")) == "it broke"
    assert in_one_line(ValueError()) == "ValueError"
    assert in_one_line("x" * 300, 10) == "xxxxxxxxxx…"


def test_unknown_names_are_answered_with_the_nearest():
    error = unknown_name("level", "fats", ["high", "fast"])
    assert str(error) == "unknown level 'fats'. Did you mean 'fast'? Known: fast, high."
    assert len(str(unknown_name("level", "x" * 9999, [f"{i}{'y' * 999}" for i in range(999)]))) < 600


def test_what_cannot_be_pickled_says_what_to_do():
    error = cannot_be_pickled("a session", "make one there")
    assert isinstance(error, InputError)
    assert str(error) == "a session cannot be pickled or copied, it belongs to this process: make one there"


def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it():
    need("json", "email.mime", extra="compile", purpose="compiling")
    with pytest.raises(
        MissingExtraError, match=r"compiling needs 'no_such', which is not installed: pip install 'cachec\[compile\]'"
    ):
        need("json", "no_such", extra="compile", purpose="compiling")
