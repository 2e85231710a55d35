"""What graphs of the toy are run with: hoisted ones, runs of forecasts, tails with a predictor or without."""

import torch
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import SIGMAS

from cachec.passes import Hoist, canonical_passes, split_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import PROLOGUE

HOIST = Hoist("timestep", ("prompt",))
TIMES = torch.tensor([0.9, 0.5, 0.2])


def run_prologue(graphs, prompt, times):
    module = graphs.modules[PROLOGUE]
    known = {"prompt": prompt, "compute_timesteps": times, "forecast_timesteps": times}
    return module(**{name: known[name] for name in placeholders(module)})


def random_run(num_steps, num_slots, batch):
    generator = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(num_slots, batch, TOKENS, WIDTH, generator=generator),
        "coefficients": torch.randn(num_steps, 1, num_slots, generator=generator),
        "bias": torch.randn(num_steps, generator=generator),
        "latents": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "deltas": -torch.rand(num_steps, generator=generator),
    }


def tail_inputs(module, batch):
    return {name: value for name, value in example_inputs(batch).items() if name in placeholders(module)}


def unfolded_inputs(module, past, step, history):
    schedule = {"sigmas": torch.from_numpy(SIGMAS), "step": torch.tensor(step), "history_steps": torch.tensor(history)}
    values = {
        **schedule,
        **{f"feature_{i}": value for i, value in enumerate(past)},
        **tail_inputs(module, len(past[0])),
    }
    return {name: values[name] for name in placeholders(module)}


def random_past(window, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, TOKENS, WIDTH, generator=generator) for _ in range(window)]


def split_at(block):
    return [canonical_passes(), split_passes(block)]
