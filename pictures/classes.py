"""Models that draw classes: a prompt is the name or the number of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cachec.runtime.errors import unknown_name
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class Classes:
    """The ``condition`` that a class is, numbers by ``names``, and the number of ``nothing``, behind those of all others."""

    condition: str
    names: Mapping[str, int]
    nothing: int

    def numbers(self, prompts: list[str]) -> Array:
        """Of each prompt [B], int64; an empty one is nothing.

        Raises:
            InputError: there is no such class, with the nearest name.
        """
        return np.array([self._number(prompt.strip()) for prompt in prompts], np.int64)

    def _number(self, prompt: str) -> int:
        if not prompt:
            return self.nothing
        if prompt.isdecimal() and int(prompt) <= self.nothing:
            return int(prompt)
        if prompt not in self.names:
            raise unknown_name("class", prompt, self.names or [f"its number, 0 to {self.nothing - 1}"])
        return int(self.names[prompt])

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "names": dict(self.names)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["condition"], data["names"], data["nothing"])
