"""From a loaded model to the graphs that engines are built from, stage by stage."""

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cachec.compiler.graphs.capture import capture_model, capture_predictor, joined
from cachec.compiler.graphs.coding import Coding
from cachec.compiler.graphs.weights import named_module, recording
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.blocks import CACHED, BlockPredictor, KeepingTransformer, PredictingTransformer
from cachec.passes import (
    Graphs,
    PassList,
    Stage,
    canonical_passes,
    cast_passes,
    engine_passes,
    inline_passes,
    linear_passes,
    run_passes,
    split_passes,
)
from cachec.passes.base import ALL, BY_ROW, Observer, compute_graphs, copy_module, outputs
from cachec.runtime.abi import COMPUTE, EXPERT, FEATURE, MODEL, TOKENS
from cachec.runtime.model_io import ModelIO

WITHIN = "transformer"  # the path of a transformer inside one that keeps its tokens
BELOW = "below"  # in the metadata of a second transformer's compute graph: the told time below which it answers

Key = tuple[int, int, int, int, str | None, str, bool]  # sizes, cut, precision, with tokens

# Graphs of models that are still loaded. By the very object, too: two pipelines in memory may come from the same files and
# have become different. Passes never change a graph that they are given, so that it can be shared.
_CAPTURED: WeakKeyDictionary[LoadedModel, dict[Key, Graphs]] = WeakKeyDictionary()
_SPLIT: WeakKeyDictionary[LoadedModel, dict[Key, Graphs]] = WeakKeyDictionary()


def prepare(model: LoadedModel, settings: Settings, observers: Sequence[Observer] = (), *, tokens: bool = False) -> Graphs:
    """The compute graph and the forecast graph, the latter with the true feature as its input.

    ``tokens``: the compute graph hands out those of image and text behind the last block, too.

    The transformer is captured as it was loaded, and stays as it is: a pass brings the graph to the settings' precision. Done
    once for each model, size and precision, and again if ``observers`` are to look on. Weights of a model on disk are named,
    not held (``weights.py``): whoever runs a graph gives it values first.
    """
    known, key = _SPLIT.setdefault(model, {}), _key(settings, settings.dtype, tokens=tokens)
    if key not in known or observers:
        captured, passes = _capture(model, settings, tokens=tokens), model_passes(model, settings, tokens=tokens)
        known[key] = _with_expert(_run(captured, passes, observers), model, settings)
    return known[key]


def _with_expert(graphs: Graphs, model: LoadedModel, settings: Settings) -> Graphs:
    """The graphs with the compute graph of a second transformer, if there is one; it knows below which told time it answers."""
    if (second := model.expert) is None:
        return graphs
    other, below = second
    compute = copy_module(prepare(other, settings).modules[COMPUTE])
    compute.meta[BELOW] = below
    return replace(graphs, modules={**graphs.modules, EXPERT: compute})


def model_passes(model: LoadedModel, settings: Settings, *, tokens: bool = False) -> list[PassList]:
    """What :func:`prepare` runs."""
    block = settings.cut or model.block
    return [*_whole_passes(model, settings), split_passes(f"{WITHIN}.{block}" if tokens else block)]


def _whole_passes(model: LoadedModel, settings: Settings) -> list[PassList]:
    """What is done to the whole model, or to what forecasts in its place."""
    io, sizes = model.io, tuple[int, ...]()
    if io.parts:
        inputs = model.example_inputs(settings)
        sizes = tuple(inputs[name].shape[io.axis] for name in (io.latents, *io.parts))
        io = replace(io, output=io.output or (0, sizes[0]))  # the output may be of the parts, too, behind what moves x
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return [canonical_passes(io, sizes), cast_passes(dtype)]


def _capture(model: LoadedModel, settings: Settings, *, tokens: bool) -> Graphs:
    known, key = _CAPTURED.setdefault(model, {}), _key(settings, "its own", tokens=tokens)
    if key not in known:
        inputs, constants = joined(model.example_inputs(settings), model.io), model.constants(settings)
        module = model.capturable(_module(model))
        if tokens:
            known[key] = capture_model(KeepingTransformer(module, model.body), inputs, constants, (TOKENS,))
        else:
            known[key] = capture_model(module, inputs, constants)
    return known[key]


def _module(model: LoadedModel) -> nn.Module:
    """The transformer in memory, or one of the same configuration without values."""
    return model.transformer if model.stored is None else named_module(model.stored)


def _run(graphs: Graphs, passes: Sequence[PassList], observers: Sequence[Observer]) -> Graphs:
    with recording():
        return run_passes(graphs, passes, observers=observers)


def _key(settings: Settings, dtype: str, *, tokens: bool) -> Key:
    return settings.height, settings.width, settings.frames, settings.text_tokens, settings.cut, dtype, tokens


def compute_only(graphs: Graphs) -> Graphs:
    """Graphs of the output cut: no forecast graph."""
    return replace(graphs, modules={name: graphs.modules[name] for name in compute_graphs(graphs)}, cut=None)


def linear(graphs: Graphs, observers: Sequence[Observer] = (), *, coding: Coding | None = None, by_row: bool = False) -> Graphs:
    """Split graphs with the forecast that all linear methods share, of features as they are or in a ``coding``.

    ``by_row``: each row of a batch has weights of its own, as branches of guidance may.
    """
    if coding is None:
        return _run(graphs, [linear_passes(groups=BY_ROW if by_row else ALL)], observers)
    captured = coding.capture(outputs(graphs.modules[COMPUTE])[FEATURE].meta["val"])
    return _run(graphs, [linear_passes(*captured, coding.groups)], observers)


def inlined(graphs: Graphs, predictor: nn.Module, *, window: int, num_steps: int, observers: Sequence[Observer] = ()) -> Graphs:
    """Split graphs with ``predictor`` inside the forecast graph; it looks at ``window`` features."""
    feature = outputs(graphs.modules[COMPUTE])[FEATURE].meta["val"]
    example = torch.zeros((2, *map(int, feature.shape[1:])), dtype=feature.dtype, device=feature.device)
    captured = capture_predictor(predictor.to(example.device), window, example, num_steps)
    return _run(graphs, [inline_passes(captured)], observers)


def with_blocks(
    model: LoadedModel, settings: Settings, predictor: BlockPredictor, observers: Sequence[Observer] = ()
) -> Graphs:
    """The model's graphs with another body of blocks for the forecast graph: see ``models/blocks.py``.

    Raises:
        InputError: the family does not say how its blocks hang together.
    """
    split = prepare(model, settings, tokens=True)
    kept = outputs(split.modules[COMPUTE])[TOKENS].meta["val"]
    inputs = joined(model.example_inputs(settings), model.io)
    shape = (len(inputs[model.io.latents]), *map(int, kept.shape[1:]))
    inputs[CACHED] = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kept.device, kept.dtype)
    module = PredictingTransformer(_module(model), model.body, predictor, model.capturable)
    whole = _run(capture_model(module, inputs, model.constants(settings)), _whole_passes(model, settings), ())
    return _run(split, [inline_passes(whole.modules[MODEL])], observers)


def engine(
    graphs: Graphs,
    io: ModelIO,
    observers: Sequence[Observer] = (),
    *,
    hoist: str = "all",
    merge: bool = True,
    velocities: bool = True,
    slots: str | None = None,
    carries: bool = False,
) -> Graphs:
    """The graphs that engines are built from.

    ``hoist``: what leaves the step graphs (``passes.HOISTS``). ``merge``: of linear layers, which copies their weights.
    ``velocities``: forecasts hand them out, for a sampler outside. ``slots``: the type that features are stored in, by
    default their own. ``carries``: steps of the sampler keep a part of the latents only.
    """
    dtype = None if slots is None else getattr(torch, slots)
    passes = engine_passes(
        io, graphs.stage or Stage.SPLIT, hoist=hoist, merge=merge, velocities=velocities, slots=dtype, carries=carries
    )
    return _run(graphs, [passes], observers)
