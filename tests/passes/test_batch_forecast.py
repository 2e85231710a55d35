"""Forecasts in a row are computed as one batch, and the sampler takes its steps behind it."""

import pytest
import torch
from toy import WIDTH, example_inputs
from toy_runs import HOIST, random_run, run_prologue

from cachec.compiler.graphs.coding import Coding
from cachec.compiler.graphs.prepare import linear
from cachec.passes import BatchForecast, Groups, run_passes
from cachec.passes.base import outputs, placeholders
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


class Channels(torch.nn.Module):
    """A code [B, L, D + 2] of a feature, or back."""

    def __init__(self, back):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        matrix = torch.randn(WIDTH, WIDTH + 2, generator=generator)
        self.register_buffer("matrix", torch.linalg.pinv(matrix) if back else matrix)

    def forward(self, feature):
        return feature @ self.matrix


@pytest.mark.parametrize("velocities", [True, False])
@torch.no_grad()
def test_every_group_of_a_code_has_its_own_weights(toy_split, velocities):
    coding = Coding(Channels(back=False), Channels(back=True), Groups((3, 5, 2), 2))
    coded = linear(toy_split, coding=coding)
    forecast = run_passes(coded, [BatchForecast("latents", "timestep", velocities)]).modules[FORECAST]
    inputs, steps, slots = example_inputs(2), 3, 2
    features = [coded.modules["compute"](**inputs)["feature"] * (1 + slot) for slot in range(slots)]
    assert features[0].shape[-1] == WIDTH + 2
    given = random_run(steps, slots, 2) | {"features": torch.stack(features)}
    given["coefficients"] = torch.randn(steps, 3, slots, generator=torch.Generator().manual_seed(5))
    rows = {"timestep": torch.linspace(0.9, 0.1, steps)[:, None].repeat(1, 2), "prompt": inputs["prompt"]}
    got = forecast(**{name: {**given, **rows}[name] for name in placeholders(forecast)})
    x, tail = given["latents"], toy_split.modules[FORECAST]
    for step in range(steps):
        parts = [torch.split(one, [3, 5, 2], -1) for one in features]
        summed = [sum(given["coefficients"][step, g, s] * parts[s][g] for s in range(slots)) for g in range(3)]
        feature = (torch.cat(summed, -1) + given["bias"][step]) @ coding.decode.matrix
        known = {"feature": feature, "timestep": rows["timestep"][step], "prompt": inputs["prompt"]}
        x = x + given["deltas"][step] * tail(**{name: known[name] for name in placeholders(tail)})["velocity"]
    torch.testing.assert_close(got["next_latents"], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("velocities", [True, False])
@torch.no_grad()
def test_every_row_of_a_batch_has_its_own_weights(toy_split, linear_graphs, velocities):
    by_row = linear(toy_split, by_row=True)
    forecast = run_passes(by_row, [BatchForecast("latents", "timestep", velocities)]).modules[FORECAST]
    steps, slots, batch = 3, 2, 4
    given, prompt = random_run(steps, slots, batch), example_inputs(batch)["prompt"]
    generator = torch.Generator().manual_seed(5)
    own = {
        "coefficients": torch.randn(steps, batch, slots, generator=generator),
        "bias": torch.randn(steps, batch, generator=generator),
    }
    times = torch.linspace(0.9, 0.1, steps)
    rows = {"timestep": times[:, None].repeat(1, batch), "prompt": prompt}
    got = forecast(**{name: {**given, **rows, **own}[name] for name in placeholders(forecast)})
    shared, single = linear_graphs.modules[FORECAST], by_row.modules[FORECAST]
    moved = given["latents"]
    for step in range(steps):
        known = {"timestep": times[step].expand(batch), "prompt": prompt, "features": given["features"]}
        numbers = {name: value[step] for name, value in own.items()}
        together = single(**{name: {**known, **numbers}[name] for name in placeholders(single)})["velocity"]
        for row in range(batch):
            one = {name: value[..., row : row + 1] for name, value in known.items() if name == "timestep"}
            one |= {"prompt": prompt[row : row + 1], "features": given["features"][:, row : row + 1]}
            one |= {"coefficients": own["coefficients"][step, row][None], "bias": own["bias"][step, row]}
            alone = shared(**{name: one[name] for name in placeholders(shared)})["velocity"]
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        moved = moved + given["deltas"][step] * together
    torch.testing.assert_close(got["next_latents"], moved, atol=1e-5, rtol=1e-5)
    size = outputs(by_row.modules["compute"])["feature"].meta["val"].shape[0]
    assert isinstance(size, torch.SymInt), "the batch was taken for a number"
    assert not str(size).isdecimal()


def test_groups_are_all_of_what_is_kept(toy_split):
    with pytest.raises(PassError, match=r"groups of \[3, 4\] along axis 2 are not all of what is kept, \[6, 8\] a sample"):
        linear(toy_split, coding=Coding(torch.nn.Identity(), torch.nn.Identity(), Groups((3, 4), 2)))


def test_no_node_tells_the_shape_of_one_step_where_there_are_several(linear_graphs):
    forecast = run_passes(linear_graphs, [BatchForecast("latents", "timestep")]).modules[FORECAST]
    assert [node for node in forecast.graph.nodes if "val" in node.meta] == []


def test_only_linear_forecasts_come_in_runs(toy_split):
    with pytest.raises(PassError, match="the forecast graph is not linear; run add_linear_forecast first"):
        run_passes(toy_split, [BatchForecast("latents", "timestep")])
