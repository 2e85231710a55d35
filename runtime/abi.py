"""Every name that graphs, engines and the runtime agree on: graphs, tensors, symbolic sizes.

``B`` batch, ``T`` steps, ``S`` slots, ``H`` of them written, ``G`` groups, ``n`` forecasts of one call, ``W`` window.
"""

import re
from collections.abc import Iterable

MODEL = "model"  # the captured transformer, before it is split
COMPUTE = "compute"  # one step of the whole model; a program may use several such graphs
EXPERT = f"{COMPUTE}_2"  # the same of a second transformer, which takes over at some step
FORECAST = "forecast"  # all forecasts between two computed steps, or one call of a predictor
PROLOGUE = "prologue"  # what depends on the request only, for all steps at once
ADVANCE = "advance"  # a share of the base plus weighted velocities
GUIDE = "guide"  # the velocities of both branches of guidance combined

VELOCITY = "velocity"  # the model's output [B, …]
VELOCITIES = "velocities"  # several of them [n, B, …], or [H, B, …] from the slots
FEATURE = "feature"  # the hidden state at the cut [B, …]
TOKENS = "tokens"  # of image and text behind the last block, which predictors made of blocks read [B, …]
FEATURES = "features"  # the written slots [H, B, …]
COEFFICIENTS = "coefficients"  # rows [n, G, H] of forecasts, or one [G, H] that moves the latents; of each sample [n, B, H]
BIAS = "bias"  # [n], or of each sample [n, B]
BASE = "base"  # what weighted velocities are added to [B, …]: the noise, or the latents of a sampler outside
BASE_SHARE = "base_share"  # how much of it [1]
TARGET_TIMESTEP = "target_timestep"  # the second time that flow maps are told [B]
GUIDANCE = "guidance_scale"  # [B]
NEGATIVE, POSITIVE = BRANCHES = "negative", "positive"  # velocities of the branches of guidance [B, …]
PAIR = "pair"  # both, one behind the other [2 B, …]
DELTA = "delta"  # what a velocity is worth, of each sample [B]: for flows a step in sigma
CARRY = "carry"  # how much of the latents a step keeps [B], or of a run of steps [1]; 1 for flows
DELTAS = "deltas"  # [n]
NEXT_LATENTS = "next_latents"  # [B, …]
SIGMAS = "sigmas"  # the whole schedule [T + 1]
STEP = "step"  # scalar int64
HISTORY_STEPS = "history_steps"  # which steps the history is of, newest first [W] int64

STEP_VALUES = "step_values"  # all that depends on the step but not on the latents, side by side [B, …]

MAX_BATCH = 1024  # that graphs are captured for
BATCH, SLOTS, FORECASTS = "batch", "slots", "forecasts"  # symbolic sizes: B, H, n
GROUPS = "groups"  # G, an axis of a fixed size


def steps_of(graph: str) -> str:
    """The symbolic size of the prologue that is the number of steps of the graph ``graph``."""
    return f"{graph}_steps"


def timesteps_of(graph: str, *, second: bool = False) -> str:
    """The prologue's input [T] with what the graph ``graph`` is told at its steps; the ``second`` time is that of flow maps."""
    return f"{graph}_{TARGET_TIMESTEP if second else 'timestep'}s"


def history_name(index: int) -> str:
    """Input name of the ``index``-th newest feature of an unfolded forecast engine."""
    return f"{FEATURE}_{index}"


def history_window(names: Iterable[str]) -> int:
    """W of an unfolded forecast graph with these inputs, of which the oldest feature counts. 0: it reads no history."""
    numbered = [int(found[1]) for name in names if (found := re.fullmatch(rf"{FEATURE}_(\d+)", name))]
    return max(numbered, default=-1) + 1


def negative_name(name: str) -> str:
    """What the condition ``name`` of guidance's negative branch is called."""
    return f"{NEGATIVE}_{name}"


def hoisted_name(graph: str, name: str) -> str:
    """What the prologue calls its result for the input ``name`` of a step graph."""
    return f"{graph}_{name}"
