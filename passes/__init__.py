"""Graph passes: FX in, FX out. They know no model, no method and no back end.

Read the lists below top-down; each line says why the pass is here. A list leads from one stage to another
(``passes/stages.py``) and says how exactly.
"""

import torch
from torch import fx

from cachec.passes.add_advance import AddAdvance
from cachec.passes.add_guidance import AddGuidance
from cachec.passes.add_linear_forecast import AddCodedForecast, AddLinearForecast
from cachec.passes.assemble_input import AssembleInput
from cachec.passes.base import Equivalence, GraphPass, Graphs, Groups, Pass, PassResult, Stage, compute_graphs
from cachec.passes.batch_forecast import BatchForecast
from cachec.passes.cast_precision import CastPrecision
from cachec.passes.cast_slots import CastSlots
from cachec.passes.decomplexify import Decomplexify
from cachec.passes.drop_asserts import DropAsserts
from cachec.passes.find_cut import FindCut
from cachec.passes.fold_constants import FoldConstants
from cachec.passes.fold_predictor import BindingTimes, binding_times, fold_step
from cachec.passes.fuse_sampler import FuseSampler
from cachec.passes.hoist import Hoist
from cachec.passes.inline_predictor import InlinePredictor
from cachec.passes.merge_linears import MergeLinears
from cachec.passes.prune import Prune
from cachec.passes.replace_type_as import ReplaceTypeAs
from cachec.passes.rewrite_bool_masked_fill import RewriteBoolMaskedFill
from cachec.passes.run import PassList, dump_to, graph_text, run_passes
from cachec.passes.share_subexpressions import ShareSubexpressions
from cachec.passes.simplify_shapes import SimplifyShapes
from cachec.passes.split_model import SplitModel
from cachec.passes.stages import check_stage
from cachec.runtime.model_io import ModelIO

__all__ = [
    "HOISTS",
    "AddAdvance",
    "AddCodedForecast",
    "AddGuidance",
    "AddLinearForecast",
    "AssembleInput",
    "BatchForecast",
    "BindingTimes",
    "CastPrecision",
    "CastSlots",
    "Decomplexify",
    "DropAsserts",
    "Equivalence",
    "FindCut",
    "FoldConstants",
    "FuseSampler",
    "GraphPass",
    "Graphs",
    "Groups",
    "Hoist",
    "InlinePredictor",
    "MergeLinears",
    "Pass",
    "PassList",
    "PassResult",
    "Prune",
    "ReplaceTypeAs",
    "RewriteBoolMaskedFill",
    "ShareSubexpressions",
    "SimplifyShapes",
    "SplitModel",
    "Stage",
    "binding_times",
    "canonical_passes",
    "cast_passes",
    "check_stage",
    "component_passes",
    "compute_graphs",
    "dump_to",
    "engine_passes",
    "fold_step",
    "graph_text",
    "inline_passes",
    "linear_passes",
    "run_passes",
    "split_passes",
]


_REWRITES: tuple[Pass, ...] = (
    DropAsserts(),  # before all others: asserts hang on values that they want to move or fold
    Decomplexify(),  # before folding, which turns the complex tables it leaves into real ones
    SimplifyShapes(),  # what is gone need not be folded, cast or exported
    ReplaceTypeAs(),  # before the split: a fake dependency would become an input of the forecast graph
    RewriteBoolMaskedFill(),  # ONNX Runtime cannot run it
    FoldConstants(),  # after all rewrites, so that what they made constant is folded too
)


def canonical_passes(io: ModelIO | None = None, sizes: tuple[int, ...] = ()) -> PassList:
    """From the captured model to one that every back end takes.

    ``io``: how its input is put together, of pieces of ``sizes`` along the axis; by default it takes nothing but the state.
    """
    return PassList(
        Stage.CAPTURED,
        (
            *([AssembleInput(io, sizes)] if io is not None else []),  # first: nothing else sees more than the state
            *_REWRITES,
            Prune(),
        ),
        Stage.CANONICAL,
        Equivalence.ROUNDING,
    )


def component_passes(dtype: torch.dtype) -> tuple[Pass, ...]:
    """From a captured part of a pipeline (a text encoder, a decoder) to what every back end takes, in ``dtype``."""
    return (*_REWRITES, CastPrecision(dtype), Prune())


def cast_passes(dtype: torch.dtype) -> PassList:
    """To another precision; before the split, so that the cut is cast."""
    return PassList(Stage.CANONICAL, (CastPrecision(dtype),), Stage.CANONICAL, Equivalence.PRECISION)


def split_passes(block: str) -> PassList:
    """From the whole model to compute and forecast graphs; ``block`` is the last block of the body."""
    return PassList(
        Stage.CANONICAL,
        (
            FindCut(block),  # marks only; on the canonical graph, so that the cut is a node that stays
            SplitModel(),
            Prune(),
        ),
        Stage.SPLIT,
        Equivalence.EXACT,
    )


def linear_passes(
    encode: fx.GraphModule | None = None, decode: fx.GraphModule | None = None, groups: Groups | None = None
) -> PassList:
    """From a split model to the forecast graph of all linear methods.

    With an ``encode``, features are kept in its code; ``groups`` are parts of it, or rows, with weights of their own.
    """
    if encode is None and decode is None:
        forecast = AddLinearForecast(groups=groups or Groups())
        return PassList(Stage.SPLIT, (forecast, Prune()), Stage.LINEAR, Equivalence.EXACT)
    passes = (
        AddCodedForecast(encode, decode, groups or Groups()),
        DropAsserts(),  # the code brings its own
        SimplifyShapes(),
        Prune(),
    )
    return PassList(Stage.SPLIT, passes, Stage.LINEAR, Equivalence.ROUNDING)


def inline_passes(predictor: fx.GraphModule) -> PassList:
    """From a split model to a forecast graph with the predictor in it."""
    return PassList(
        Stage.SPLIT,
        (
            InlinePredictor(predictor),
            DropAsserts(),  # the predictor brings its own
            SimplifyShapes(),
            Prune(),
        ),
        Stage.INLINED,
        Equivalence.ROUNDING,
    )


HOISTS = ("none", "tables", "all")  # what leaves the step graphs: nothing, what depends on the prompt, on the step too


def engine_passes(
    io: ModelIO,
    stage: Stage,
    *,
    hoist: str = "all",
    merge: bool = True,
    velocities: bool = True,
    slots: torch.dtype | None = None,
    carries: bool = False,
) -> PassList:
    """From graphs of single steps, which are at ``stage``, to what engines are built from.

    ``merge``: of linear layers, which copies their weights. ``velocities``: forecasts hand them out. ``slots``: what features
    are stored in, if not in their own type. ``carries``: steps of the sampler keep a part of the latents only.
    """
    return PassList(
        stage,
        (
            *([Hoist(io.timestep, io.conditions, per_step=hoist == "all"), ShareSubexpressions()] if hoist != "none" else []),
            *([MergeLinears()] if merge else []),  # behind hoisting, which takes single modulations
            # needs to know what was hoisted by step
            *([BatchForecast(io.latents, io.timestep, velocities, carries)] if stage == Stage.LINEAR else []),
            FuseSampler(io.latents, carries),
            AddAdvance(),
            *([AddGuidance(io.guidance)] if io.guidance is not None else []),
            *([CastSlots(slots)] if slots is not None else []),  # last: the sampler reads velocities that were not cast
            Prune(),
        ),
        Stage.ENGINE,
        Equivalence.ROUNDING if slots is None else Equivalence.PRECISION,
    )
