"""What does not depend on the latents is computed ahead of the steps, once for all of them."""

import pytest
import torch
from toy import TOKENS, WIDTH, ToyDiT, example_inputs
from toy_bundle import split
from toy_runs import HOIST, TIMES, run_prologue

from cachec.passes import Hoist, MergeLinears, Prune, ShareSubexpressions, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE
from cachec.runtime.errors import PassError


def names(module):
    return set(placeholders(module))


def weights(module):
    return {id(parameter) for parameter in module.parameters()}


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
