"""How a pipeline makes conditions of prompts: its own calls of its tokenizers are seen, and what lies behind them is a module.

Nothing is guessed. The pipeline runs once on a prompt, with spies in place of its tokenizers: what they are given says how a
prompt is cleaned, what stands around it, how many tokens are read. Its own encoding of prompts, handed tokens in place of what
tokenizers give, is a module from tokens to conditions, which can be captured.

``L`` tokens.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BatchEncoding, ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cachec.compiler.models.base import Settings
from cachec.pictures.classes import Classes
from cachec.pictures.cleaning import clean
from cachec.pictures.tokens import POOLED, TEXT, TokenFacts, TokenReader
from cachec.runtime.errors import InputError

PROBE = "A  Red &amp;amp; “blue”\n ring, right of it "  # tells what is done to a prompt before it is read
CLEANINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("strip",),
    ("lower", "strip"),
    ("unescape", "strip", "single spaces", "strip"),
)


@dataclass(frozen=True, eq=False)
class TokenCall:
    """One call of a tokenizer whose tokens are read: its number among those of this tokenizer, text, limit, and result."""

    tokenizer: str
    number: int
    text: str
    special: bool
    length: int
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def names(self) -> tuple[str, str]:
        """What inputs for its ids and its mask are called."""
        which = self.tokenizer if not self.number else f"{self.tokenizer}_call_{self.number + 1}"
        return f"{which}_ids", f"{which}_mask"


@dataclass(frozen=True, eq=False)
class Seen:
    """A run of the pipeline on one prompt: calls whose tokens are read, and of the method that encodes prompts.

    ``places``: which of its results is which condition.
    """

    calls: tuple[TokenCall, ...]
    keywords: Mapping[str, Any]
    places: Mapping[str, int]


class Reading:
    """How ``model``'s pipeline reads prompts at some settings. It needs the text encoders, which are loaded.

    ``classes``: what prompts are, if they are no texts.
    """

    def __init__(self, model: Any, settings: Settings, classes: Classes | None = None) -> None:
        self.model, self.settings, self.classes = model, settings, classes
        self.names = model.io.conditions  # asked for now: a model without its transformer describes it first
        self._tokenizers = [name for name in model.pipeline.config if name.startswith("tokenizer")]
        self._tokenizers = [name for name in self._tokenizers if getattr(model.pipeline, name, None) is not None]
        self.seen = Seen((), {}, {}) if classes else self.watch(PROBE)

    def watch(self, prompt: str) -> Seen:
        """Run the pipeline on one prompt, and look on."""
        calls = _Calls()
        twin = self._twin({name: _Watched(name, getattr(self.model.pipeline, name), calls) for name in self._tokenizers})
        encodings: list[tuple[Mapping[str, Any], Any]] = []
        method = self.model.ENCODING
        real = getattr(twin.pipeline, method)

        def spy(*args: Any, **keywords: Any) -> Any:
            made = real(*args, **keywords)
            encodings.append((inspect.signature(real).bind(*args, **keywords).arguments, made))
            return made

        vars(twin.pipeline)[method] = spy
        handed = twin.handed_for([prompt], self.settings)
        if len(encodings) != 1:
            raise InputError(f"{self._kind} calls {method} {len(encodings)} times for a prompt")
        keywords, made = encodings[0]
        results = made if isinstance(made, tuple | list) else (made,)
        places = {name: _place_of(value, results) for name, value in handed.items() if name in self.names}
        return Seen(tuple(calls.read), keywords, {name: place for name, place in places.items() if place is not None})

    @property
    def _kind(self) -> str:
        return type(self.model.pipeline).__name__

    def _twin(self, parts: Mapping[str, Any]) -> Any:
        """The model with other parts in its pipeline; nothing that is done to it changes this one's."""
        twin = copy.copy(self.model)
        twin.pipeline = copy.copy(self.model.pipeline)
        vars(twin.pipeline).update(parts)
        return twin

    @cached_property
    def readers(self) -> tuple[TokenReader, ...]:
        """What makes each call's tokens, without the pipeline.

        Raises:
            InputError: what the pipeline does is not known.
        """
        return tuple(TokenReader(self._facts(call), self.file(call.tokenizer)) for call in self.seen.calls)

    def _facts(self, call: TokenCall) -> TokenFacts:
        tokenizer = getattr(self.model.pipeline, call.tokenizer)
        known = self.model.CLEANING.get(call.tokenizer)
        found = next((steps for steps in (CLEANINGS if known is None else [known]) if clean(PROBE, steps) in call.text), None)
        if found is None:
            raise InputError(f"{self._kind} changes prompts before it reads them, in a way that is not known: {call.text!r}")
        before, _, after = call.text.partition(clean(PROBE, found))
        readers = {reader.tokenizer: reader for reader in self.model.readers(self.settings)}
        reader = None if call.number else readers.get(call.tokenizer)
        ids, mask = call.names
        return TokenFacts(
            tokenizer=call.tokenizer,
            ids=ids,
            mask=mask,
            length=self.model.read_length(call.tokenizer, call.length, self.settings),
            pad=int(tokenizer.pad_token_id),
            before=before,
            after=after,
            special=call.special,
            cleaning=found,
            tells=None if reader is None else (POOLED if reader.pooled else TEXT),
            told_length=0 if reader is None else reader.length,
            blank=call.tokenizer in self.model.BLANK,
        )

    def file(self, tokenizer: str) -> str:
        """A tokenizer as ``tokenizer.json`` has it.

        Raises:
            InputError: it is none of the library tokenizers, nor one of bytes.
        """
        made = getattr(self.model.pipeline, tokenizer)
        if isinstance(made, ByT5Tokenizer):
            return _of_bytes(made)
        if not getattr(made, "is_fast", False):
            raise InputError(f"{tokenizer} is a {type(made).__name__}, which is not of the library tokenizers")
        text: str = made.backend_tokenizer.to_str()
        return text

    def module(self) -> nn.Module:
        """From tokens [1, L] by name to conditions by name: the pipeline's own code behind its tokenizers."""
        return _Encoding(self)

    def conditions(self, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What :meth:`module` computes."""
        parts = {
            name: _Handed(
                getattr(self.model.pipeline, name), [call for call in self.seen.calls if call.tokenizer == name], tokens
            )
            for name in self._tokenizers
        }
        found: dict[str, torch.Tensor] = self._twin(parts).conditions_of(tokens, self.seen, self.settings)
        return found


class _Encoding(nn.Module):
    """The text encoders are its parts, so that their weights are its own."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading
        pipeline = reading.model.pipeline
        for name in pipeline.config:
            if name.startswith("text_encoder") and isinstance(part := getattr(pipeline, name), nn.Module):
                self.add_module(name, part)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._reading.conditions(inputs)


class _Calls:
    """The calls of tokenizers that were seen, in order."""

    def __init__(self) -> None:
        self.read: list[TokenCall] = []

    def add(self, tokenizer: str, text: str, special: bool, limit: int, made: Any) -> None:
        number = sum(call.tokenizer == tokenizer for call in self.read)
        self.read.append(TokenCall(tokenizer, number, text, special, limit, made["input_ids"], made["attention_mask"]))


class _Watched:
    """Stands in for a tokenizer and does as it does; calls that are read are kept."""

    def __init__(self, name: str, tokenizer: Any, calls: _Calls) -> None:
        self._name, self._tokenizer, self._calls = name, tokenizer, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        made = self._tokenizer(text, **options)
        if _is_read(options):
            (one,) = [text] if isinstance(text, str) else text
            limit = options.get("max_length") or self._tokenizer.model_max_length
            self._calls.add(self._name, one, options.get("add_special_tokens", True), limit, made)
        return made

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        made = self._tokenizer.apply_chat_template(messages, **options)
        if options.get("tokenize", True):
            reading = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")
            kept = {name: value for name, value in options.items() if name not in reading}
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **kept)
            (one,) = [text] if isinstance(text, str) else text
            self._calls.add(self._name, one, False, options["max_length"], made)
        return made


class _Handed:
    """Stands in for a tokenizer whose tokens are there already."""

    def __init__(self, tokenizer: Any, calls: Sequence[TokenCall], tokens: Mapping[str, torch.Tensor]) -> None:
        self._tokenizer, self._calls, self._tokens = tokenizer, iter(calls), tokens
        self._last: BatchEncoding | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        if not _is_read(options):  # what a pipeline looks at to warn: nothing was cut
            return BatchEncoding({"input_ids": torch.zeros(1, 0), "attention_mask": torch.zeros(1, 0)})
        return self._next()

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        if options.get("tokenize", True):
            return self._next()
        return self._tokenizer.apply_chat_template(messages, **options)

    def _next(self) -> BatchEncoding:
        ids, mask = next(self._calls).names
        return BatchEncoding({"input_ids": self._tokens[ids], "attention_mask": self._tokens[mask]})


def _of_bytes(tokenizer: ByT5Tokenizer) -> str:
    """A tokenizer whose tokens are bytes, behind those that mean something, which is written in Python."""
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())][: tokenizer.offset]
    numbers = {token: number for number, token in enumerate(special)}
    numbers |= {letter: byte + tokenizer.offset for byte, letter in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ends = str(tokenizer.eos_token)
    made.post_processor = processors.TemplateProcessing(single=f"$A {ends}", special_tokens=[(ends, numbers[ends])])
    text: str = made.to_str()
    return text


def _is_read(options: Mapping[str, Any]) -> bool:
    """Do encoders read what this call gives? Pipelines make others to see what they cut off."""
    return bool(options.get("truncation"))


def _place_of(value: Any, results: Sequence[Any]) -> int | None:
    """Which result this value is."""
    if not isinstance(value, torch.Tensor):
        return None
    same = (isinstance(one, torch.Tensor) and torch.equal(one.to(value.dtype), value) for one in results)
    return next((place for place, found in enumerate(same) if found), None)
