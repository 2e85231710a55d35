"""Latents move by a weighted sum of velocities."""

import torch
from toy_runs import random_run

from cachec.passes import AddAdvance, run_passes
from cachec.runtime.abi import ADVANCE


@torch.no_grad()
def test_advance_adds_weighted_velocities_to_a_share_of_the_base(toy_split):
    module = run_passes(toy_split, [AddAdvance()]).modules[ADVANCE]
    given = random_run(1, 4, 2)
    row = given["coefficients"][0]
    share = torch.tensor([0.5])
    got = module(base=given["latents"], velocities=given["features"], coefficients=row, base_share=share)["next_latents"]
    expected = 0.5 * given["latents"] + torch.einsum("h,h...->...", row[0], given["features"])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
