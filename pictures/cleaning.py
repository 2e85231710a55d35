"""What pipelines do to a prompt before they read it, as steps with names, which a bundle's manifest lists."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from cachec.runtime.errors import BundleError, shortened

STEPS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "lower": str.lower,
        "strip": str.strip,
        "unescape": lambda text: html.unescape(html.unescape(text)),
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
