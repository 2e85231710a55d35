"""Files of arrays that know what they are of: safetensors, with facts in words as metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cachec.runtime.errors import CachecError
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class FactsFile:
    """A kind of file: ``name`` in messages, the ``command`` that makes one, the ``error`` that says what is wrong with one."""

    name: str
    format: str
    command: str
    error: type[CachecError]

    def content(self, arrays: Mapping[str, Array], facts: Mapping[str, str]) -> bytes:
        """The bytes of such a file."""
        ordered = {name: np.asarray(value, order="C") for name, value in arrays.items()}  # others would be written as they lie
        content: bytes = save(ordered, {**facts, "format": self.format})
        return content

    def read(self, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
        """Arrays by name, and facts.

        Raises:
            CachecError: the file is missing, damaged, or something else; of the kind's own error.
        """
        if not path.is_file():
            raise self.error(f"{self.name} {path} does not exist: make one with {self.command}")
        try:
            with safe_open(path, "np") as file:
                facts = dict(file.metadata() or {})
            arrays: dict[str, Array] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise self.damaged(path, error) from error
        if facts.get("format") != self.format:
            raise self.error(f"{path} is not a {self.name} file of this cachec ({self.format}): make one with {self.command}")
        return arrays, facts

    def damaged(self, path: Path, error: Exception) -> CachecError:
        """An error for a file that does not read as one."""
        return self.error(f"{path} is not a {self.name} file, or is damaged ({error!r}): make one with {self.command}")

    def check(self, facts: Mapping[str, str], wanted: Mapping[str, str], origin: str) -> None:
        """Raise the kind's error, with all reasons, unless ``facts`` are those ``wanted``; ``origin``: where they are from."""
        reasons = [
            f"{name} is {_short(facts.get(name, 'unknown'))}, wanted {_short(value)}"
            for name, value in wanted.items()
            if facts.get(name) != value
        ]
        if reasons:
            made = f" (made for {facts['model']})" if "model" in facts else ""
            raise self.error(
                f"{self.name} {origin}{made} is of something else: {'; '.join(reasons)}. "
                f"Make one for these settings with {self.command}"
            )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}…"
