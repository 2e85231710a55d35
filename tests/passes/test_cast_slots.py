"""Slots of a smaller type: what is kept is rounded, sums are not."""

import copy

import torch
from toy import example_inputs
from toy_bundle import IO
from toy_runs import random_run

from cachec.compiler.graphs.prepare import compute_only
from cachec.passes import Stage, engine_passes, run_passes
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST


@torch.no_grad()
def test_slots_of_a_smaller_type_round_features_and_nothing_else(linear_graphs):
    plain, small = (
        run_passes(linear_graphs, [engine_passes(IO, Stage.LINEAR, hoist="none", slots=slots)])
        for slots in (None, torch.float16)
    )
    inputs = {**example_inputs(), "delta": torch.tensor([-0.3, 0.2])}
    wanted, got = (graphs.modules[COMPUTE](**inputs) for graphs in (plain, small))
    assert got["feature"].dtype == torch.float16
    assert torch.equal(got["feature"], wanted["feature"].half())
    assert torch.equal(got["velocity"], wanted["velocity"])
    assert torch.equal(got["next_latents"], wanted["next_latents"])
    run = {**random_run(4, 3, 2), "timestep": torch.rand(4, 2), "prompt": inputs["prompt"]}
    run["features"] = run["features"].half()
    known = {name: run[name] for name in placeholders(plain.modules[FORECAST])}
    wanted = plain.modules[FORECAST](**{**known, "features": run["features"].float()})
    assert torch.equal(small.modules[FORECAST](**known)["next_latents"], wanted["next_latents"])


@torch.no_grad()
def test_slots_of_the_output_cut_hold_velocities(toy_split):
    graphs = run_passes(compute_only(toy_split), [engine_passes(IO, Stage.SPLIT, slots=torch.float16)])
    assert outputs(graphs.modules[COMPUTE])["velocity"].meta["val"].dtype == torch.float16
    given = random_run(1, 4, 2)
    velocities, row = given["features"].half(), given["coefficients"][0]
    inputs = {"base": given["latents"], "velocities": velocities, "coefficients": row, "base_share": torch.ones(1)}
    got = graphs.modules[ADVANCE](**inputs)["next_latents"]
    expected = given["latents"] + torch.einsum("h,h...->...", row[0], velocities.float())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_half_precision_cannot_hold_becomes_the_largest_it_can(toy_split):
    passes = engine_passes(IO, Stage.SPLIT, hoist="none", slots=torch.float16)
    compute = copy.deepcopy(run_passes(compute_only(toy_split), [passes]).modules[COMPUTE])
    next(value for name, value in compute.named_parameters() if name.endswith(".out.bias")).fill_(1e6)
    largest = compute(**example_inputs(), delta=torch.tensor([-0.3, 0.2]))["velocity"]
    assert torch.equal(largest, torch.full_like(largest, torch.finfo(torch.float16).max))
