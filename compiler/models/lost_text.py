"""What text encoders never see of long prompts, and that it is said once."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cachec.pictures.losses import words_of_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """A tokenizer of the pipeline, by name, whose text encoder reads ``length`` tokens.

    ``pooled``: what it makes of the prompt is one vector, and another one reads more; ``--text-tokens`` does not change it.
    """

    tokenizer: str
    length: int
    pooled: bool = False


def tell_of_lost_text(prompts: Sequence[str], pipeline: Any, readers: Sequence[Reader], told: set[str]) -> None:
    """Warn of each prompt that is cut, with what is lost; once, by ``told``, to which it is added."""
    for prompt in dict.fromkeys(prompts):
        if prompt in told:
            continue
        for reader in readers:
            tokenizer = getattr(pipeline, reader.tokenizer)
            if tokenizer is None or not (lost := lost_text(prompt, tokenizer, reader.length)):
                continue
            told.add(prompt)
            log.warning("%s", words_of_loss(prompt, lost, reader.length, pooled=reader.pooled))


def lost_text(prompt: str, tokenizer: Any, length: int) -> str:
    """What a text encoder that reads ``length`` tokens never sees of ``prompt``: its end, or nothing."""
    read = tokenizer(prompt, truncation=False, verbose=False)
    if len(read.input_ids) <= length:
        return ""
    if tokenizer.is_fast:
        return prompt[read.token_to_chars(length - 1).start :].strip()  # one place is for the token that ends the text
    return str(tokenizer.decode(read.input_ids[length - 1 : -1])).strip()


@contextmanager
def not_said_twice(module: str) -> Iterator[None]:
    """The pipeline of ``module`` says, too, that a prompt is cut; elsewhere it may."""
    pipelines = logging.getLogger(module)
    pipelines.addFilter(_is_news)
    try:
        yield
    finally:
        pipelines.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "was truncated because" not in record.getMessage()
