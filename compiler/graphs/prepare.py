"""The front half of every compilation: capture the transformer and cut it in two."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.passes import Graphs, Pass, run_passes, split_passes
from cachec.passes.base import Observer

Key = tuple[str, int, int, int, str]  # weights, sizes, precision

# Graphs of models that are still loaded. By the very object, too: two pipelines in memory may come from the same files and
# have become different. Passes never change a graph that they are given, so that it can be shared.
_CAPTURED: WeakKeyDictionary[LoadedModel, dict[Key, Graphs]] = WeakKeyDictionary()
_SPLIT: WeakKeyDictionary[LoadedModel, dict[Key, Graphs]] = WeakKeyDictionary()


def split_model(model: LoadedModel, settings: Settings, observers: Sequence[Observer] = ()) -> Graphs:
    """The compute graph and the forecast graph, the latter with the true feature as its input.

    The transformer is captured as it was loaded, and stays as it is: a pass brings the graph to the settings' precision. Done
    once for each model, size and precision, and again if ``observers`` are to look on.
    """
    known, key = _SPLIT.setdefault(model, {}), _key(model, settings, settings.dtype)
    if key not in known or observers:
        known[key] = run_passes(_capture(model, settings), model_passes(model, settings), observers=observers)
    return known[key]


def model_passes(model: LoadedModel, settings: Settings) -> list[Pass]:
    """What :func:`split_model` runs."""
    return split_passes(model.block, getattr(torch, settings.dtype))


def _capture(model: LoadedModel, settings: Settings) -> Graphs:
    known, key = _CAPTURED.setdefault(model, {}), _key(model, settings, "its own")
    if key not in known:
        known[key] = capture_model(model.transformer, model.example_inputs(settings), model.constants(settings))
    return known[key]


def _key(model: LoadedModel, settings: Settings, dtype: str) -> Key:
    return model.weights_hash, settings.height, settings.width, settings.text_tokens, dtype
