"""The sampler's step is part of the computed step."""

import torch
from toy import example_inputs

from cachec.passes import FuseSampler, run_passes
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE


@torch.no_grad()
def test_the_sampler_moves_latents_by_delta_times_velocity(toy_split):
    fused, inputs = run_passes(toy_split, [FuseSampler("latents")]), example_inputs()
    delta = torch.tensor([-0.3, 0.2])
    result = fused.modules[COMPUTE](**inputs, delta=delta)
    assert torch.equal(result["next_latents"], inputs["latents"] + result["velocity"] * delta[:, None, None])
    assert set(outputs(fused.modules[COMPUTE])) == {"velocity", "feature", "next_latents"}
