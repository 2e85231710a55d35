"""Prompts as tokens: what a pipeline's tokenizer makes of them, by ``tokenizers`` and the facts in a bundle's manifest.

``B`` prompts, ``L`` tokens.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from cachec.pictures.cleaning import check_characters, clean
from cachec.pictures.losses import words_of_loss
from cachec.runtime.errors import BundleError, in_one_line, missing_extra, shortened
from cachec.runtime.specs import Array

if importlib.util.find_spec("tokenizers") is None:
    raise missing_extra("tokenizers", "pictures", "reading prompts")
from tokenizers import Tokenizer

log = logging.getLogger(__name__)

MOST_TOLD = 1000  # prompts that are remembered
MOST_TOKENS = 2**20  # that a prompt is read at
TEXT, POOLED = "text", "pooled"  # what is made of tokens: states by token, or one vector, for which a short length may do


@dataclass(frozen=True)
class TokenFacts:
    """How one tokenizer reads a prompt: what it is called in the bundle, and what is done around it.

    ``ids`` and ``mask`` are inputs of text encoders [B, L], int64. The prompt is cleaned by steps, and stands between
    ``before`` and ``after``; ``special``: the tokenizer adds what it adds to every text. It is cut at ``length`` tokens, or
    padded with ``pad`` at its end; ``blank``: an empty text is padding alone. ``tells``: whose loss is told of, if a prompt is
    cut, and at how many tokens of its own.
    """

    tokenizer: str
    ids: str
    mask: str
    length: int
    pad: int
    before: str = ""
    after: str = ""
    special: bool = True
    cleaning: tuple[str, ...] = ()
    tells: str | None = None
    told_length: int = 0
    blank: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "cleaning": list(self.cleaning)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """``data`` may have more: of which file the tokenizer is.

        Raises:
            BundleError: its numbers are none that a tokenizer has.
        """
        known = {one.name: data[one.name] for one in fields(cls)}
        for name, least, most in (("length", 1, MOST_TOKENS), ("told_length", 0, MOST_TOKENS), ("pad", 0, 2**31 - 1)):
            if not least <= known[name] <= most:
                raise BundleError(
                    f"{name} of the tokenizer {shortened(known['tokenizer'])} is {shortened(known[name])}, expected {least} to "
                    f"{most}: compile the bundle again"
                )
        return cls(**{**known, "cleaning": tuple(known["cleaning"])})


class TokenReader:
    """Reads prompts as a pipeline's tokenizer does. ``source``: its ``tokenizer.json``, which is read when it is wanted."""

    def __init__(self, facts: TokenFacts, source: Path | str) -> None:
        self.facts = facts
        self._source = source

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            text = self._source if isinstance(self._source, str) else self._source.read_text(encoding="utf-8")
            made = Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise BundleError(f"the tokenizer {self.facts.tokenizer} cannot be read: {in_one_line(error)}") from error
        made.no_padding()
        made.no_truncation()
        return made

    @cached_property
    def _cutting(self) -> Tokenizer:
        """One that cuts texts, so that what ends every text is at the end of a cut one, too."""
        cutting = Tokenizer.from_str(self._tokenizer.to_str())
        cutting.enable_truncation(self.facts.length)
        return cutting

    def read(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Ids and masks [B, L] by the names of the encoders' inputs. Raises ``InputError`` for what is no text."""
        facts = self.facts
        ids = np.full((len(prompts), facts.length), facts.pad, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            whole = self._whole(prompt)
            found = [] if facts.blank and not whole else self._cutting.encode(whole, add_special_tokens=facts.special).ids
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        return {facts.ids: ids, facts.mask: mask}

    def lost(self, prompt: str) -> str:
        """What no encoder behind this reader sees of the prompt: its end, or nothing."""
        facts = self.facts
        whole = self._whole(prompt)
        read = self._tokenizer.encode(whole, add_special_tokens=facts.special)
        if len(read.ids) <= facts.length:
            return ""
        last = facts.length - 1  # one place is for the token that ends the text
        begin = next((read.offsets[at][0] for at in range(last, len(read.ids)) if read.offsets[at] != (0, 0)), len(whole))
        return whole[begin : len(whole) - len(facts.after)].strip()

    def _whole(self, prompt: str) -> str:
        check_characters(prompt)
        facts = self.facts
        return f"{facts.before}{clean(prompt, facts.cleaning)}{facts.after}"


def tell_of_loss(prompts: Sequence[str], readers: Sequence[TokenReader], told: set[str]) -> None:
    """Warn of each prompt that is cut, with what is lost; once, by ``told``, to which it is added."""
    if len(told) > MOST_TOLD:
        told.clear()
    for prompt in dict.fromkeys(prompts):
        for reader in readers if prompt not in told else ():
            if reader.facts.tells is not None and (lost := reader.lost(prompt)):
                told.add(prompt)
                log.warning("%s", words_of_loss(prompt, lost, reader.facts.told_length, pooled=reader.facts.tells == POOLED))
