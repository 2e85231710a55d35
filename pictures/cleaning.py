"""What pipelines do to a prompt before they read it, as steps with names, which a bundle's manifest lists."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from cachec.runtime.errors import BundleError, InputError, shortened

IN_QUOTES = re.compile(r"\"(.*?)\"|“(.*?)”")


def _texts_in_quotes(prompt: str) -> str:
    """What a picture is to show in letters, as HunyuanVideo-1.5 says it to its second encoder; nothing if there are none."""
    found = dict.fromkeys(plain or curly for plain, curly in IN_QUOTES.findall(prompt))
    return "".join(f'Text "{text}". ' for text in found)


STEPS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "lower": str.lower,
        "strip": str.strip,
        "unescape": lambda text: html.unescape(html.unescape(text)),
        "space if empty": lambda text: text or " ",
        "texts in quotes": _texts_in_quotes,
        "single spaces": lambda text: re.sub(r"\s+", " ", text),
    }
)


def clean(prompt: str, steps: Sequence[str]) -> str:
    """The prompt as it is read, after these steps.

    Raises:
        BundleError: one of them is not known.
    """
    for step in steps:
        if step not in STEPS:
            raise BundleError(f"prompts are to be cleaned by {shortened(step)}, which this cachec does not know: install the "
                              "cachec that wrote the bundle, or compile it again")  # fmt: skip
        prompt = STEPS[step](prompt)
    return prompt


def check_characters(text: str) -> None:
    """Raise ``InputError`` for a text with half of a surrogate pair, as JSON and command lines may bring it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has {text[error.start]!r} at place {error.start}, which is no character: send it as UTF-8"
        ) from error
