"""Texts that are as long as they need be: a bundle may have engines for several lengths, where its model masks its padding.

``B`` batch, ``L`` tokens.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from cachec.runtime.abi import negative_name
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.specs import Array


def fit_texts(io: ModelIO, conditions: Mapping[str, Array], lengths: Collection[int]) -> tuple[int | None, Mapping[str, Array]]:
    """The shortest of the lengths that holds the texts of numpy arrays, and these at it; ``None``: they are left as they are.

    That is so where padding counts, where the only length is theirs, and where something else is wrong with them.

    Raises:
        InputError: none holds them.
    """
    if io.text is None or not set(io.text) <= conditions.keys():
        return None, conditions
    own = [conditions[name] for name in (*io.text, *map(negative_name, io.text)) if name in conditions]
    if any(not isinstance(one, np.ndarray) or one.ndim < 2 for one in own):
        return None, conditions
    if len(lengths) < 2 and {one.shape[1] for one in own} <= {*lengths}:
        return None, conditions
    length = shortest_text(lengths, text_length(io, conditions))
    return length, with_text_length(io, conditions, length)


def text_length(io: ModelIO, conditions: Mapping[str, Array]) -> int:
    """How many tokens the longest text of a request has, both branches of guidance counted; by its masks [B, L]."""
    assert io.text is not None, "only of models with a mask"
    masks = [conditions[name] for name in (io.text[1], negative_name(io.text[1])) if name in conditions]
    return max(map(masked_length, masks), default=0)


def masked_length(mask: Array) -> int:
    """How many tokens a mask [B, L] tells of, up to the last one in any row."""
    places = np.flatnonzero(np.asarray(mask).any(axis=0))
    return int(places[-1]) + 1 if len(places) else 0


def shortest_text(lengths: Iterable[int], needed: int) -> int:
    """The shortest of the lengths that holds a text of so many tokens.

    Raises:
        InputError: none does.
    """
    known = sorted(lengths)
    if needed > known[-1]:
        raise InputError(
            f"a text has {needed} tokens, and the engines take up to {known[-1]}: shorten the prompt, or compile with more "
            "--text-tokens"
        )
    return next(length for length in known if length >= needed)


def with_text_length(io: ModelIO, conditions: Mapping[str, Array], length: int) -> dict[str, Array]:
    """Conditions whose texts and masks are this long: padded with zeros, or cut behind what the masks tell."""
    assert io.text is not None, "only of models with a mask"
    names = {*io.text, *map(negative_name, io.text)}
    return {name: _resized(value, length) if name in names else value for name, value in conditions.items()}


def _resized(value: Array, length: int) -> Array:
    missing = length - value.shape[1]
    if missing <= 0:
        return np.ascontiguousarray(value[:, :length])
    return np.pad(value, [(0, 0), (0, missing), *[(0, 0)] * (value.ndim - 2)])
