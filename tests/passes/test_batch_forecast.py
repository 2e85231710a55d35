"""Forecasts in a row are computed as one batch, and the sampler takes its steps behind it."""

import pytest
import torch
from toy import example_inputs
from toy_runs import HOIST, random_run, run_prologue

from cachec.passes import BatchForecast, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import PassError


@pytest.mark.parametrize(("num_steps", "num_slots", "batch"), [(1, 1, 1), (4, 1, 2), (6, 3, 1), (2, 5, 3)])
@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize("velocities", [True, False])
@torch.no_grad()
def test_a_run_of_forecasts_equals_its_steps_one_by_one(linear_graphs, num_steps, num_slots, batch, hoist, velocities):
    graphs = run_passes(linear_graphs, [*([HOIST] if hoist else []), BatchForecast("latents", "timestep", velocities)])
    prompt = example_inputs(batch)["prompt"]
    times, given = torch.linspace(0.9, 0.1, num_steps), random_run(num_steps, num_slots, batch)
    rows = {"timestep": times[:, None].repeat(1, batch), "prompt": prompt}
    if hoist:
        rows |= {"step_values": run_prologue(graphs, prompt, times)["forecast_step_values"]}
    forecast = graphs.modules[FORECAST]
    got = forecast(**{name: {**given, **rows}[name] for name in placeholders(forecast)})
    x, single = given["latents"], linear_graphs.modules[FORECAST]
    for step in range(num_steps):
        known = {
            "features": given["features"],
            "coefficients": given["coefficients"][step],
            "bias": given["bias"][step],
            "timestep": times[step].expand(batch),
            "prompt": prompt,
        }
        velocity = single(**{name: known[name] for name in placeholders(single)})["velocity"]
        if velocities:
            torch.testing.assert_close(got["velocities"][step], velocity, atol=1e-5, rtol=1e-5)
        x = x + given["deltas"][step] * velocity
    assert set(got) == {"next_latents", "velocities"} if velocities else {"next_latents"}
    torch.testing.assert_close(got["next_latents"], x, atol=1e-5, rtol=1e-5)


def test_no_node_tells_the_shape_of_one_step_where_there_are_several(linear_graphs):
    forecast = run_passes(linear_graphs, [BatchForecast("latents", "timestep")]).modules[FORECAST]
    assert [node for node in forecast.graph.nodes if "val" in node.meta] == []


def test_only_linear_forecasts_come_in_runs(toy_split):
    with pytest.raises(PassError, match="the forecast graph is not linear; run add_linear_forecast first"):
        run_passes(toy_split, [BatchForecast("latents", "timestep")])
