"""The front half of every compilation: capture the transformer and cut it in two."""

from collections.abc import Sequence

import torch

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.passes import Graphs, Pass, run_passes, split_passes
from cachec.passes.base import Observer


def split_model(model: LoadedModel, settings: Settings, observers: Sequence[Observer] = ()) -> Graphs:
    """The compute graph and the forecast graph, the latter with the true feature as its input.

    The transformer is captured as it was loaded, and stays as it is: a pass brings the graph to the settings' precision.
    """
    captured = capture_model(model.transformer, model.example_inputs(settings), model.constants(settings))
    return run_passes(captured, model_passes(model, settings), observers=observers)


def model_passes(model: LoadedModel, settings: Settings) -> list[Pass]:
    """What :func:`split_model` runs."""
    return split_passes(model.block, getattr(torch, settings.dtype))
