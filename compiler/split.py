"""The front half of every compilation: capture the transformer and cut it in two."""

from collections.abc import Sequence

import torch

from cachec.compiler.capture import capture_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.passes import Graphs, canonical_passes, run_passes, split_passes
from cachec.passes.base import Observer


def canonical_model(model: LoadedModel, settings: Settings) -> Graphs:
    """The captured transformer, whole, in the form that every back end takes."""
    return run_passes(_capture(model, settings), canonical_passes())


def split_model(model: LoadedModel, settings: Settings, observers: Sequence[Observer] = ()) -> Graphs:
    """The compute graph and the forecast graph, the latter with the true feature as its input."""
    return run_passes(_capture(model, settings), split_passes(model.block), observers=observers)


def _capture(model: LoadedModel, settings: Settings) -> Graphs:
    transformer = model.transformer.to(getattr(torch, settings.dtype))
    return capture_model(transformer, model.example_inputs(settings), model.constants(settings))
