"""Which engine input plays which part, and how the model's own input is put together from the state of sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachec.runtime.abi import GUIDANCE, negative_name
from cachec.runtime.errors import BundleError, shortened


@dataclass(frozen=True)
class ModelIO:
    """Names of the model's inputs by the part that they play.

    ``latents`` (the state x that sampling moves) and ``timestep`` change with every step; ``conditions`` (prompt, guidance)
    are given once per request. ``parts`` are those conditions that the model takes joined to x, behind it along ``axis``:
    references that an edit starts from, the first frame of a video. ``output`` is the part [begin, end) of the model's output
    along ``axis`` that moves x, ``None`` for all of it. A pass puts both into the graph; nothing behind it sees more than x.

    ``guidance`` names the rule by which the outputs u of the negative and c of the positive branch become one, at scale s:
    ``plain`` u + s (c - u); ``renormalised`` the same, scaled to the norm of c along the last axis; ``extra`` c + s (c - u).
    ``None``: the model has one branch. Guided requests have the ``conditions``
    of both branches, those of the negative one under ``negative_name``, and a scale.

    ``text`` names a condition [B, L, …] and its mask [B, L], if the model looks at nothing behind the last token of the mask:
    then it does not matter how far the text is padded. ``None``: it does, or nobody knows.
    """

    latents: str
    timestep: str
    conditions: tuple[str, ...]
    parts: tuple[str, ...] = ()
    axis: int = 1
    output: tuple[int, int] | None = None
    guidance: str | None = None
    text: tuple[str, str] | None = None

    @property
    def request_conditions(self) -> tuple[str, ...]:
        """What a request brings besides noise, by name."""
        if self.guidance is None:
            return self.conditions
        return (*self.conditions, *map(negative_name, self.conditions), GUIDANCE)

    def to_json(self) -> dict[str, Any]:
        """What engines are called with; how the input is put together is in their graphs by then."""
        names: dict[str, Any] = {"latents": self.latents, "timestep": self.timestep, "conditions": list(self.conditions)}
        names |= {} if self.guidance is None else {"guidance": self.guidance}
        return names if self.text is None else {**names, "text": list(self.text)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelIO":
        try:
            parts = data["latents"], data["timestep"], tuple(data["conditions"])
            text = None
            if data.get("text") is not None:
                states, mask = data["text"]
                text = states, mask
            return cls(*parts, guidance=data.get("guidance"), text=text)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"the manifest does not say which input plays which part: io is {shortened(data)}") from error
