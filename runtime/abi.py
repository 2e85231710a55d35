"""Every name that graphs, engines and the runtime agree on: graphs, tensors, symbolic sizes.

``B`` batch, ``T`` steps, ``S`` slots, ``H`` of them written, ``n`` forecasts of one call, ``W`` window.
"""

MODEL = "model"  # the captured transformer, before it is split
COMPUTE = "compute"  # one step of the whole model
FORECAST = "forecast"  # all forecasts between two computed steps, or one call of a predictor
PROLOGUE = "prologue"  # what depends on the request only, for all steps at once
ADVANCE = "advance"  # the output cut: noise plus weighted velocities

VELOCITY = "velocity"  # the model's output [B, …]
VELOCITIES = "velocities"  # several of them [n, B, …], or [H, B, …] from the slots
FEATURE = "feature"  # the hidden state at the cut [B, …]
FEATURES = "features"  # the written slots [H, B, …]
COEFFICIENTS = "coefficients"  # rows [n, H] of forecasts, or one row [H] that moves the latents
BIAS = "bias"  # [n]
NOISE = "noise"  # the latents that a request began with [B, …]
DELTA = "delta"  # a step in sigma [1]
DELTAS = "deltas"  # [n]
NEXT_LATENTS = "next_latents"  # [B, …]
SIGMAS = "sigmas"  # the whole schedule [T + 1]
STEP = "step"  # scalar int64
HISTORY_STEPS = "history_steps"  # which steps the history is of, newest first [W] int64

STEP_VALUES = "step_values"  # all that depends on the step but not on the latents, side by side [B, …]

MAX_BATCH = 1024  # that graphs are captured for
BATCH, SLOTS, FORECASTS = "batch", "slots", "forecasts"  # symbolic sizes: B, H, n
STEPS_OF = {"compute": "compute_steps", "forecast": "forecast_steps"}  # symbolic sizes of the prologue
TIMESTEPS_OF = {"compute": "compute_timesteps", "forecast": "forecast_timesteps"}  # its inputs [T]


def history_name(index: int) -> str:
    """Input name of the ``index``-th newest feature of an unfolded forecast engine."""
    return f"feature_{index}"


def hoisted_name(engine: str, name: str) -> str:
    """What the prologue calls its result for the input ``name`` of a step engine."""
    return f"{engine}_{name}"
