"""What JSON from a file must look like, as data: checked before anything is made of it.

A form is a type, or a tuple of several; ``[form]`` for a list, ``[]`` for one of anything; ``{name: form}`` for a mapping that
has these names, those that end in ``?`` if it likes, and may have others; ``{"*": form}`` for one whose values all have a form.
"""

from collections.abc import Callable
from typing import Any

from cachec.runtime.errors import BundleError, shortened

Form = type | tuple[type, ...] | list[Any] | dict[str, Any]
ANY = "*"
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}


def check_form(value: Any, form: Form, place: str, advice: str) -> None:
    """Raise ``BundleError`` unless ``value`` has this form; says where in ``place`` it has not, and ``advice``."""

    def check(value: Any, form: Form, place: str) -> None:
        if isinstance(form, list):
            _expect(isinstance(value, list), value, "a list", place, advice)
            for index, entry in enumerate(value if form else ()):
                check(entry, form[0], f"{place}[{index}]")
        elif isinstance(form, dict):
            _expect(isinstance(value, dict), value, "a mapping", place, advice)
            _check_names(value, form, place, advice, check)
        else:
            kinds = form if isinstance(form, tuple) else (form,)
            fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            _expect(fits, value, " or ".join(_NAMES[kind] for kind in kinds), place, advice)

    check(value, form, place)


def _check_names(
    value: dict[str, Any], form: dict[str, Any], place: str, advice: str, check: Callable[[Any, Form, str], None]
) -> None:
    if ANY in form:
        for name, entry in value.items():
            check(entry, form[ANY], f"{place}[{shortened(name)}]")
        return
    for name, wanted in form.items():
        if name.rstrip("?") in value:
            check(value[name.rstrip("?")], wanted, f"{place}.{name.rstrip('?')}")
        elif not name.endswith("?"):
            raise BundleError(f"{place} lacks {name!r}: {advice}")


def _expect(fits: bool, value: Any, wanted: str, place: str, advice: str) -> None:
    if not fits:
        raise BundleError(f"{place} is {shortened(value)}, expected {wanted}: {advice}")
