"""The forecast graph: a predictor inlined into the tail and folded, or the linear one that all linear methods share."""

from collections.abc import Sequence

import torch

from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods.base import PredictorMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.tables.schedule import Schedule
from cachec.passes import Graphs, engine_passes, forecast_passes, run_passes
from cachec.passes.base import Observer, placeholders
from cachec.runtime.abi import COMPUTE, FEATURES, FORECAST


def linear_graphs(model: LoadedModel, split: Graphs, settings: Settings) -> Graphs:
    """The compute graph and the linear forecast graph."""
    return inline(model, split, settings, Reuse(), Schedule(settings.steps, (0,)), None, fold=True)


def engine_graphs(
    model: LoadedModel,
    graphs: Graphs,
    hoist: str,
    observers: Sequence[Observer] = (),
    *,
    velocities: bool = True,
    slots: str | None = None,
) -> Graphs:
    """The graphs that engines are built from; with ``velocities``, forecasts hand them out for a sampler outside.

    ``slots`` is the type that features are stored in, by default their own.
    """
    io, linear = model.io, FORECAST in graphs.modules and FEATURES in placeholders(graphs.modules[FORECAST])
    dtype = None if slots is None else getattr(torch, slots)
    names = (io.latents, io.timestep, io.conditions)
    passes = engine_passes(*names, linear=linear, hoist=hoist, velocities=velocities, slots=dtype)
    return run_passes(graphs, passes, observers=observers)


def inline(
    model: LoadedModel,
    split: Graphs,
    settings: Settings,
    method: PredictorMethod,
    schedule: Schedule,
    parameters: Parameters | None,
    *,
    fold: bool,
    observers: Sequence[Observer] = (),
) -> Graphs:
    """Inline a predictor into the forecast graph and, with ``fold``, fold it to numbers."""
    with torch.no_grad():
        example = split.modules[COMPUTE](**model.example_inputs(settings))["feature"]
    example = example.cpu() if fold else example  # folding runs the predictor, on little data
    predictor = capture_predictor(method.predictor(parameters).to(example.device), method.window, example, settings.steps)
    sigmas = torch.from_numpy(model.sampling(settings)[0])
    passes = forecast_passes(predictor, sigmas, method.histories(schedule), fold=fold)
    return run_passes(split, passes, observers=observers)
