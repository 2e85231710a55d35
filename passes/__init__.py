"""Graph passes: FX in, FX out. They know no model, no method and no back end.

Read the two lists below top-down; each line says why the pass is here.
"""

from collections.abc import Mapping

import torch
from torch import fx

from cachec.passes.add_advance import AddAdvance
from cachec.passes.base import GraphPass, Graphs, Pass, PassResult, PredictorRows, dump_to, graph_text, run_passes
from cachec.passes.batch_forecast import BatchForecast
from cachec.passes.cast_precision import CastPrecision
from cachec.passes.cast_slots import CastSlots
from cachec.passes.decomplexify import Decomplexify
from cachec.passes.drop_asserts import DropAsserts
from cachec.passes.drop_noop_squeezes import DropNoopSqueezes
from cachec.passes.expand_attention_masks import ExpandAttentionMasks
from cachec.passes.find_cut import FindCut
from cachec.passes.fold_constants import FoldConstants
from cachec.passes.fold_static import FoldStatic
from cachec.passes.fuse_sampler import FuseSampler
from cachec.passes.hoist import Hoist
from cachec.passes.inline_predictor import InlinePredictor
from cachec.passes.merge_linears import MergeLinears
from cachec.passes.prune import Prune
from cachec.passes.replace_type_as import ReplaceTypeAs
from cachec.passes.rewrite_bool_masked_fill import RewriteBoolMaskedFill
from cachec.passes.share_subexpressions import ShareSubexpressions
from cachec.passes.split_model import SplitModel
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST, MODEL, PROLOGUE

__all__ = [
    "ADVANCE",
    "COMPUTE",
    "FORECAST",
    "MODEL",
    "PROLOGUE",
    "AddAdvance",
    "BatchForecast",
    "CastPrecision",
    "CastSlots",
    "Decomplexify",
    "DropAsserts",
    "DropNoopSqueezes",
    "ExpandAttentionMasks",
    "FindCut",
    "FoldConstants",
    "FoldStatic",
    "FuseSampler",
    "GraphPass",
    "Graphs",
    "Hoist",
    "InlinePredictor",
    "MergeLinears",
    "Pass",
    "PassResult",
    "PredictorRows",
    "Prune",
    "ReplaceTypeAs",
    "RewriteBoolMaskedFill",
    "ShareSubexpressions",
    "SplitModel",
    "canonical_passes",
    "dump_to",
    "engine_passes",
    "forecast_passes",
    "graph_text",
    "run_passes",
    "split_passes",
]


def canonical_passes(dtype: torch.dtype | None = None) -> list[Pass]:
    """From the captured model to one that every back end takes, unsplit; in ``dtype`` or else in its own precision."""
    return [
        DropAsserts(),  # first: asserts hang on values that later passes want to move or fold
        Decomplexify(),  # before folding, which turns the complex tables it leaves into real ones
        DropNoopSqueezes(),  # ONNX shape inference rejects them
        ReplaceTypeAs(),  # before the split: a fake dependency would become an input of the forecast graph
        RewriteBoolMaskedFill(),  # ONNX Runtime cannot run it
        ExpandAttentionMasks(),  # ONNX Runtime cannot run it either
        FoldConstants(),  # after all rewrites, so that what they made constant is folded too
        *([CastPrecision(dtype)] if dtype is not None else []),  # on what is left; before the split, so that the cut is cast
    ]


def split_passes(block: str, dtype: torch.dtype | None = None) -> list[Pass]:
    """From the captured model to compute and forecast graphs; ``block`` is the last block of the body."""
    return [
        *canonical_passes(dtype),
        FindCut(block),  # marks only; on the canonical graph, so that the cut is a node that stays
        SplitModel(),
        Prune(),
    ]


def forecast_passes(
    predictor: fx.GraphModule, sigmas: torch.Tensor, histories: Mapping[int, tuple[int, ...]], *, fold: bool
) -> list[Pass]:
    """From a split model to a forecast graph with the predictor in it, folded to numbers if ``fold``."""
    return [
        InlinePredictor(predictor),
        DropAsserts(),  # the predictor brings its own
        *([FoldStatic(sigmas, histories)] if fold else []),  # needs the predictor and the tail in one graph
        Prune(),  # last: folding leaves the predictor's weights and inputs unread
    ]


HOISTS = ("none", "tables", "all")  # what leaves the step graphs: nothing, what depends on the prompt, on the step too


def engine_passes(
    latents: str,
    timestep: str,
    conditions: tuple[str, ...],
    *,
    linear: bool,
    hoist: str = "all",
    velocities: bool = True,
    slots: torch.dtype | None = None,
) -> list[Pass]:
    """From graphs of single steps to what engines are built from. ``latents``, ``timestep``, ``conditions``: input names.

    ``linear``: there is a linear forecast graph, not none and not one with a predictor inside. ``velocities``: it hands
    them out. ``slots``: what features are stored in, if not in their own type.
    """
    return [
        *(
            []
            if hoist == "none"
            else [Hoist(timestep, conditions, per_step=hoist == "all"), ShareSubexpressions(), MergeLinears()]
        ),
        *([BatchForecast(latents, timestep, velocities)] if linear else []),  # needs to know what was hoisted by step
        FuseSampler(latents),
        AddAdvance(),
        *([CastSlots(slots)] if slots is not None else []),  # last: the sampler reads velocities that were not cast
        Prune(),
    ]
