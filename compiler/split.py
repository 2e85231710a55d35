"""The front half of every compilation: capture the transformer and cut it in two."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from cachec.compiler.capture import capture_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.passes import Graphs, run_passes, split_passes
from cachec.passes.base import Observer


def split_model(model: LoadedModel, settings: Settings, observers: Sequence[Observer] = ()) -> Graphs:
    """The compute graph and the forecast graph, the latter with the true feature as its input."""
    return run_passes(_capture(model, settings), split_passes(model.block), observers=observers)


def cast_transformer(model: LoadedModel, settings: Settings) -> nn.Module:
    """The transformer in the settings' precision: itself, or a copy, so that the loaded model stays as it is."""
    dtype = getattr(torch, settings.dtype)
    transformer = model.transformer
    if next(transformer.parameters()).dtype == dtype:
        return transformer
    return copy.deepcopy(transformer).to(dtype)


def _capture(model: LoadedModel, settings: Settings) -> Graphs:
    return capture_model(cast_transformer(model, settings), model.example_inputs(settings), model.constants(settings))
