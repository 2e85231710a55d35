"""From graphs of single steps to those of engines: hoisting, forecasts in runs, the sampler inside."""

import copy

import pytest
import torch
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import IO, split

import cachec.passes
from cachec.compiler.graphs.prepare import compute_only, linear
from cachec.passes import (
    AddAdvance,
    BatchForecast,
    FuseSampler,
    Hoist,
    MergeLinears,
    Prune,
    ShareSubexpressions,
    Stage,
    engine_passes,
    run_passes,
)
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import ADVANCE, COMPUTE, FORECAST, PROLOGUE
from cachec.runtime.errors import PassError

HOIST = Hoist("timestep", ("prompt",))
TIMES = torch.tensor([0.9, 0.5, 0.2])


@pytest.fixture(scope="module")
def linear_graphs(toy_split):
    return linear(toy_split)


def names(module):
    return set(placeholders(module))


def run_prologue(graphs, prompt, times):
    module = graphs.modules[PROLOGUE]
    known = {"prompt": prompt, "compute_timesteps": times, "forecast_timesteps": times}
    return module(**{name: known[name] for name in placeholders(module)})


def weights(module):
    return {id(parameter) for parameter in module.parameters()}


def test_all_that_the_room_offers_is_there():
    assert [name for name in cachec.passes.__all__ if not hasattr(cachec.passes, name)] == []


@torch.no_grad()
def test_one_step_hoisted_equals_the_step_unsplit_exactly(toy_split):
    """Batched over one step the products have the same sizes, so that the split itself is seen."""
    hoisted, inputs = run_passes(toy_split, [HOIST]), example_inputs(1)
    made = run_prologue(hoisted, inputs["prompt"], inputs["timestep"])
    got = hoisted.modules[COMPUTE](latents=inputs["latents"], step_values=made["compute_step_values"][0])
    wanted = toy_split.modules[COMPUTE](**inputs)
    assert torch.equal(got["velocity"], wanted["velocity"])
    assert torch.equal(got["feature"], wanted["feature"])


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_many_steps_hoisted_equal_each_step_to_rounding(toy_split, batch):
    passes = [HOIST, ShareSubexpressions(), MergeLinears(), Prune()]
    hoisted, inputs = run_passes(toy_split, passes), example_inputs(batch)
    made = run_prologue(hoisted, inputs["prompt"], TIMES)
    assert made["compute_step_values"].shape[:2] == (len(TIMES), batch)
    for number, time in enumerate(TIMES):
        step = {**inputs, "timestep": time.expand(batch)}
        wanted = toy_split.modules[COMPUTE](**step)["velocity"]
        row = made["compute_step_values"][number]
        got = hoisted.modules[COMPUTE](latents=inputs["latents"], step_values=row)["velocity"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        feature = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(number))
        tail, hoisted_tail = toy_split.modules[FORECAST], hoisted.modules[FORECAST]
        wanted = tail(feature=feature, **{n: step[n] for n in placeholders(tail) if n != "feature"})["velocity"]
        got = hoisted_tail(feature=feature, step_values=made["forecast_step_values"][number])["velocity"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_passes_say_that_they_changed_something(toy_split):
    told = {}
    watch = [lambda index, one, result: told.setdefault(one.name, result.changed)]
    run_passes(linear(toy_split, observers=watch), [engine_passes(IO, Stage.LINEAR, slots=torch.float16)], observers=watch)
    assert {name for name, changed in told.items() if not changed} <= {"prune"}  # others leave little to it


def test_step_graphs_lose_inputs_and_weights(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    assert names(hoisted.modules[COMPUTE]) == {"latents", "step_values"}
    assert names(hoisted.modules[FORECAST]) == {"feature", "step_values"}
    assert names(hoisted.modules[PROLOGUE]) == {"prompt", "compute_timesteps", "forecast_timesteps"}
    model = ToyDiT()
    left = {name for name, _ in model.named_parameters() if "modulation" in name or name.startswith("time.")}
    kept = {name.removeprefix("model.") for name, _ in hoisted.modules[COMPUTE].named_parameters()}
    assert not kept & left
    assert len(weights(hoisted.modules[COMPUTE])) == len(weights(toy_split.modules[COMPUTE])) - len(left)
    assert weights(hoisted.modules[PROLOGUE]) <= weights(toy_split.modules[COMPUTE])  # shared, not copied


def test_hoisting_leaves_the_graphs_it_was_given_alone(toy_split):
    before = {name: str(module.graph) for name, module in toy_split.modules.items()}
    run_passes(toy_split, [HOIST, MergeLinears()])
    assert {name: str(module.graph) for name, module in toy_split.modules.items()} == before


def test_a_prologue_that_reads_latents_is_refused(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    wrong = hoisted.with_modules(**{**hoisted.modules, PROLOGUE: toy_split.modules[COMPUTE]})
    with pytest.raises(PassError, match=r"the prologue reads \['latents', 'timestep'\], which change from step to step"):
        HOIST.ensures(wrong)


class Worded(torch.nn.Module):
    """Reads a prompt of several tokens by itself, and with the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.text = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH))
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH)])
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, latents, timestep, words):
        told = self.text(words)  # once per request
        mixed = torch.tanh(told * timestep[:, None, None])  # of all tokens at every step
        x = self.embed(latents) + mixed.mean(1, keepdim=True)
        return self.out(torch.relu(self.blocks[0](x)))


@pytest.fixture(scope="module")
def worded():
    inputs = {**example_inputs(), "words": torch.randn(2, 3, WIDTH)}
    del inputs["prompt"]
    return inputs, split(Worded().eval(), inputs, "blocks.0")


@pytest.mark.parametrize("per_step", [True, False])
@torch.no_grad()
def test_values_of_the_request_are_made_once_and_tokens_are_not_kept_for_each_step(worded, per_step):
    inputs, split = worded
    hoisted = run_passes(split, [Hoist("timestep", ("words",), per_step=per_step)])
    made = hoisted.modules[PROLOGUE](words=inputs["words"])
    assert {name: value.shape for name, value in made.items()} == {"compute_text_0": (2, 3, WIDTH)}
    step = {"latents": inputs["latents"], "timestep": inputs["timestep"], "text_0": made["compute_text_0"]}
    compute = hoisted.modules[COMPUTE]
    assert names(compute) == {"latents", "timestep", "text_0"}
    assert torch.equal(compute(**step)["velocity"], split.modules[COMPUTE](**inputs)["velocity"])


def test_tables_only_leave_what_depends_on_the_step(toy_split):
    """The toy's modulations mix prompt and step, and nothing depends on the prompt alone."""
    assert PROLOGUE not in run_passes(toy_split, [Hoist("timestep", ("prompt",), per_step=False)]).modules


@torch.no_grad()
def test_equal_parts_of_several_graphs_are_computed_once(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    shared = run_passes(hoisted, [ShareSubexpressions()])
    count = [sum(n.op == "call_function" for n in g.modules[PROLOGUE].graph.nodes) for g in (hoisted, shared)]
    assert count[1] < count[0]
    inputs = example_inputs()
    for name, value in run_prologue(hoisted, inputs["prompt"], TIMES).items():
        assert torch.equal(run_prologue(shared, inputs["prompt"], TIMES)[name], value)


@torch.no_grad()
def test_neighbouring_linears_become_one(toy_split):
    hoisted = run_passes(toy_split, [HOIST])
    merged = run_passes(hoisted, [MergeLinears()])
    linear = torch.ops.aten.linear.default
    count = [sum(n.target is linear for n in g.modules[PROLOGUE].graph.nodes) for g in (hoisted, merged)]
    assert count[1] < count[0]
    inputs = example_inputs()
    for name, value in run_prologue(hoisted, inputs["prompt"], TIMES).items():
        torch.testing.assert_close(run_prologue(merged, inputs["prompt"], TIMES)[name], value, atol=1e-6, rtol=1e-6)


def random_run(num_steps, num_slots, batch):
    generator = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(num_slots, batch, TOKENS, WIDTH, generator=generator),
        "coefficients": torch.randn(num_steps, 1, num_slots, generator=generator),
        "bias": torch.randn(num_steps, generator=generator),
        "latents": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "deltas": -torch.rand(num_steps, generator=generator),
    }


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


@torch.no_grad()
def test_the_sampler_moves_latents_by_delta_times_velocity(toy_split):
    fused, inputs = run_passes(toy_split, [FuseSampler("latents")]), example_inputs()
    delta = torch.tensor([-0.3, 0.2])
    result = fused.modules[COMPUTE](**inputs, delta=delta)
    assert torch.equal(result["next_latents"], inputs["latents"] + result["velocity"] * delta[:, None, None])
    assert set(outputs(fused.modules[COMPUTE])) == {"velocity", "feature", "next_latents"}


@torch.no_grad()
def test_advance_adds_weighted_velocities_to_a_share_of_the_base(toy_split):
    module = run_passes(toy_split, [AddAdvance()]).modules[ADVANCE]
    given = random_run(1, 4, 2)
    row = given["coefficients"][0]
    share = torch.tensor([0.5])
    got = module(base=given["latents"], velocities=given["features"], coefficients=row, base_share=share)["next_latents"]
    expected = 0.5 * given["latents"] + torch.einsum("h,h...->...", row[0], given["features"])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("hoist", ["none", "tables", "all"])
def test_engine_passes_leave_graphs_that_export_and_read_everything(linear_graphs, hoist):
    graphs = run_passes(linear_graphs, [engine_passes(IO, Stage.LINEAR, hoist=hoist)])
    assert set(graphs.modules) == {COMPUTE, FORECAST, ADVANCE, *([PROLOGUE] if hoist == "all" else [])}
    for name, module in graphs.modules.items():
        for node in placeholders(module).values():
            assert node.users, f"{name} does not read {node}"


class Expanded(torch.nn.Module):
    """A modulation in two pieces, one of which is spread over the tokens before it is read, the other doubled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.modulation = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH)])
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, latents, timestep, prompt):
        shift, scale = self.modulation(prompt * timestep[:, None]).chunk(2, dim=1)
        x = latents + shift[:, None].expand(-1, TOKENS, -1)
        return self.out(torch.relu(self.blocks[0](x * (scale + scale)[:, None])))


class Learned(Expanded):
    """The modulation reads something learned, too, as often as there are samples."""

    def __init__(self):
        super().__init__()
        self.modulation = torch.nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, latents, timestep, prompt):
        learned = self.out.bias.expand(prompt.shape[0], WIDTH)
        shift, scale = self.modulation(torch.cat([prompt * timestep[:, None], learned], 1)).chunk(2, dim=1)
        return self.out(torch.relu(self.blocks[0](latents * (1 + scale[:, None]) + shift[:, None])))


@pytest.mark.parametrize("model", [Expanded, Learned])
@torch.no_grad()
def test_a_modulation_is_hoisted_and_cut_right(model):
    inputs = example_inputs()
    whole = split(model().eval(), inputs, "blocks.0")
    hoisted = run_passes(whole, [HOIST])
    made = run_prologue(hoisted, inputs["prompt"], TIMES)["compute_step_values"]
    for row, time in zip(made, TIMES, strict=True):
        wanted = whole.modules[COMPUTE](**{**inputs, "timestep": time.expand(2)})["velocity"]
        got = hoisted.modules[COMPUTE](latents=inputs["latents"], step_values=row)["velocity"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_one_of_a_scale_is_added_ahead():
    compute = run_passes(split(Learned().eval(), example_inputs(), "blocks.0"), [HOIST]).modules[COMPUTE]
    sums = [node for node in compute.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert [len(node.all_input_nodes) for node in sums] == [2]  # the shift


def test_values_are_handed_over_in_the_type_they_are_made_in():
    narrow = split(Learned().eval(), example_inputs(), "blocks.0", torch.float16)
    compute = run_passes(narrow, [HOIST]).modules[COMPUTE]
    assert placeholders(compute)["step_values"].meta["val"].dtype == torch.float16


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
