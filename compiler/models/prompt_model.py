"""What all families of diffusers' pipelines have in common in reading prompts. ``B`` prompts, ``L`` tokens."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch

from cachec.compiler.models.base import Family, Settings
from cachec.compiler.models.inputs import owned
from cachec.compiler.models.lost_text import Reader, not_said_twice, tell_of_lost_text
from cachec.compiler.models.observed import Observed
from cachec.compiler.models.reading import Reading, Seen
from cachec.runtime.abi import GUIDANCE, negative_name
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


class PromptModel(Family):
    """A pipeline that reads prompts.

    What a family says of it, beside the methods:

    - ``LENGTH``: the keyword of the text length in the pipeline's call, if there is one.
    - ``TOKENIZER``: of the text encoder that reads ``text_tokens`` of a prompt, if there is one.
    - ``ENCODING``: the pipeline's method that makes embeddings of prompts.
    - ``CLEANING``: by tokenizer, what is done to prompts, where a probe does not tell all of it; ``BLANK``: those of which
      an empty text has no tokens at all.
    """

    LENGTH: ClassVar[str | None] = "max_sequence_length"
    TOKENIZER: ClassVar[str | None] = "tokenizer"
    ENCODING: ClassVar[str] = "encode_prompt"
    CLEANING: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    BLANK: ClassVar[tuple[str, ...]] = ()
    _told: set[str]  # prompts that are cut, and that was said

    def readers(self, settings: Settings) -> Sequence[Reader]:
        """What reads the prompts, and how much of them."""
        return () if self.TOKENIZER is None else [Reader(self.TOKENIZER, settings.text_tokens)]

    def text(self, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
        """Prompts as keywords of the pipeline's call."""
        return {"prompt": list(prompts)}

    def opposed(self, prompts: Sequence[str], negatives: Sequence[str] | None) -> Sequence[str]:
        """Prompts of the negative branch; by default there is nothing in them."""
        return [""] * len(prompts) if negatives is None else negatives

    def read_length(self, tokenizer: str, limit: int, settings: Settings) -> int:
        """How many tokens of a call that is cut at ``limit`` are looked at; by default all."""
        return limit

    def conditions_of(self, tokens: Mapping[str, torch.Tensor], seen: Seen, settings: Settings) -> dict[str, torch.Tensor]:
        """Conditions of tokens [1, L], by the names of their inputs, which the pipeline's tokenizers hand it already.

        It must be what the pipeline makes of the same tokens, and depend on no value of them but by tensors. By default its
        own code: the method that makes embeddings, called as the pipeline calls it.
        """
        made = getattr(self.pipeline, self.ENCODING)(**seen.keywords)
        results = made if isinstance(made, tuple | list) else (made,)
        given = {name: results[place] for name, place in seen.places.items()}
        taken = self.taken(dict.fromkeys(self.io.conditions) | given, settings)
        return {name: taken[name] for name in self.io.conditions if name in given}

    def reading(self, settings: Settings) -> Reading:
        if self.io.parts:
            raise InputError(f"{self.spec.name} reads a picture with its prompt, which only its pipeline can")
        self._load(*self._text_encoders)
        return Reading(self, settings)

    def encode(
        self, prompts: Sequence[str], settings: Settings, names: Sequence[str], negatives: Sequence[str] | None = None
    ) -> dict[str, Array]:
        if negatives is not None and self.io.guidance is None:
            raise InputError(f"{self.spec.name} has no negative prompt: it takes its guidance scale as an input. Leave it out")
        found = self._encode(prompts, settings)
        if any(negative_name(name) in names for name in self.io.conditions):
            others = self._encode(self.opposed(prompts, negatives), settings)
            found |= {negative_name(name): value for name, value in others.items()}
        found.setdefault(GUIDANCE, np.full(len(prompts), self.branch_scale(settings), np.float32))
        return {name: found[name] for name in names}

    def _encode(self, prompts: Sequence[str], settings: Settings) -> dict[str, Array]:
        seen = self.handed_for(prompts, settings)
        return {name: owned(value).cpu().numpy() for name, value in self.taken(seen, settings).items()}

    def handed_for(self, prompts: Sequence[str], settings: Settings) -> Mapping[str, Any]:
        """What the pipeline hands its transformer for these prompts, one branch of guidance."""
        self.check_sizes(settings)
        text = self.text(prompts, settings)
        tell_of_lost_text(text.get("prompt", ()), self.pipeline, self.readers(settings), self._told)
        self._load(*self._text_encoders)
        length = {} if self.LENGTH is None else {self.LENGTH: settings.text_tokens}
        with not_said_twice(type(self.pipeline).__module__):
            return self._observe(settings, {**text, **length}, whole=False).first

    @property
    def _text_encoders(self) -> list[str]:
        return [name for name in self.pipeline.config if name.startswith("text_encoder")]

    @abstractmethod
    def check_sizes(self, settings: Settings) -> None:
        """Raise ``InputError`` unless the model makes what these settings ask for."""

    @abstractmethod
    def _observe(self, settings: Settings, given: Mapping[str, Any], *, whole: bool = True) -> Observed:
        """Run the pipeline with a spy in the transformer's place."""

    @abstractmethod
    def _load(self, *names: str) -> None:
        """Load components that are not there yet."""
