import pytest
import torch
from torch import nn
from toy import WIDTH, ToyDiT, example_inputs
from toy_bundle import LAST_BLOCK, eager_velocity

from cachec.compiler.graphs.capture import capture_model
from cachec.passes import FindCut, SplitModel, canonical_passes, graph_text, run_passes, split_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import COMPUTE, FORECAST, MODEL
from cachec.runtime.errors import PassError

BEFORE_CUT = ", ".join(one.name for one in canonical_passes())


def split_at(block):
    return [canonical_passes(), split_passes(block)]


@pytest.fixture(scope="module")
def toy():
    return ToyDiT().eval()


@pytest.fixture(scope="module")
def model(toy):
    return capture_model(toy, example_inputs())


@pytest.fixture(scope="module")
def split(model):
    return run_passes(model, split_at(LAST_BLOCK))


def tail_inputs(split, inputs):
    return {name: inputs[name] for name in placeholders(split.modules[FORECAST]) if name in inputs}


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_compute_equals_the_model_exactly(split, batch):
    inputs = example_inputs(batch)
    assert torch.equal(split.modules[COMPUTE](**inputs)["velocity"], eager_velocity(inputs))


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_forecast_fed_with_the_true_feature_equals_the_model_exactly(split, batch):
    inputs = example_inputs(batch)
    feature = split.modules[COMPUTE](**inputs)["feature"]
    velocity = split.modules[FORECAST](feature=feature, **tail_inputs(split, inputs))["velocity"]
    assert torch.equal(velocity, eager_velocity(inputs))


@torch.no_grad()
def test_forecast_depends_on_the_feature(split):
    inputs = example_inputs()
    feature = split.modules[COMPUTE](**inputs)["feature"]
    velocity = split.modules[FORECAST](feature=feature.flip(-1), **tail_inputs(split, inputs))["velocity"]
    assert not torch.allclose(velocity, eager_velocity(inputs))


def test_the_feature_is_the_output_of_the_last_block(toy, split):
    seen = []
    handle = toy.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        toy(**example_inputs())
        feature = split.modules[COMPUTE](**example_inputs())["feature"]
    handle.remove()
    assert torch.equal(feature, seen[0])


def test_forecast_takes_only_what_the_tail_reads(split):
    assert set(placeholders(split.modules[FORECAST])) == {"feature", "timestep", "prompt"}
    assert list(placeholders(split.modules[COMPUTE])) == ["latents", "timestep", "prompt"]


def test_forecast_holds_the_parameters_of_the_tail_and_no_others(toy, split):
    tail = [toy.blocks[0].modulation, toy.time, toy.norm_out, toy.out]
    wanted = {id(parameter) for module in tail for parameter in module.parameters()}
    assert {id(parameter) for parameter in split.modules[FORECAST].parameters()} == wanted
    assert not list(split.modules[FORECAST].buffers())


def test_compute_shares_every_parameter_with_the_model(toy, split):
    assert {id(p) for p in split.modules[COMPUTE].parameters()} == {id(p) for p in toy.parameters()}


def test_running_passes_leaves_the_model_alone(model):
    module = model.modules[MODEL]
    text, code, state = graph_text(module), module.code, {k: id(v) for k, v in module.named_buffers()}
    run_passes(model, split_at(LAST_BLOCK))
    assert (graph_text(module), module.code) == (text, code)
    assert {k: id(v) for k, v in module.named_buffers()} == state
    assert torch.equal(module(**example_inputs())["velocity"], eager_velocity(example_inputs()))


def test_running_passes_twice_gives_the_same_graphs(model, split):
    again = run_passes(model, split_at(LAST_BLOCK))
    assert {k: graph_text(m) for k, m in again.modules.items()} == {k: graph_text(m) for k, m in split.modules.items()}


@torch.no_grad()
def test_the_cut_may_be_after_an_earlier_block(model):
    inputs = example_inputs()
    split = run_passes(model, split_at("blocks.1"))
    feature = split.modules[COMPUTE](**inputs)["feature"]
    velocity = split.modules[FORECAST](feature=feature, **tail_inputs(split, inputs))["velocity"]
    assert torch.equal(velocity, eager_velocity(inputs))


def test_a_block_that_the_tail_calls_into_again_is_refused(model):
    with pytest.raises(PassError, match=r"'blocks\.0' must hand one value to the tail, it hands over: \w+ .*, \w+ "):
        run_passes(model, split_at("blocks.0"))


@pytest.mark.parametrize("block", ["block.2", "blocks.3", "blocks.22"])
def test_an_unknown_block_is_refused_with_a_suggestion(model, block):
    with pytest.raises(PassError, match=rf"no node of the graph is under block '{block}'\. Did you mean 'blocks"):
        run_passes(model, [FindCut(block)])


def test_a_block_is_not_mistaken_for_one_whose_name_begins_like_it():
    toy = ToyDiT(num_blocks=11).eval()
    split = run_passes(capture_model(toy, example_inputs()), split_at("blocks.1"))
    kept = {id(parameter) for parameter in split.modules[FORECAST].parameters()}
    assert kept.isdisjoint(id(parameter) for parameter in toy.blocks[1].parameters())
    assert kept.issuperset(id(parameter) for block in toy.blocks[2:] for parameter in block.parameters())


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.sin(self.image(x)), torch.cos(self.text(x))


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Body()

    def forward(self, latents):
        image, text = self.body(latents)
        return image * text


def test_a_body_that_hands_over_two_values_is_refused_with_their_names():
    model = capture_model(TwoStreams().eval(), {"latents": example_inputs()["latents"]})
    with pytest.raises(PassError, match=r"'body' must hand one value to the tail, it hands over: sin .*, cos "):
        run_passes(model, [FindCut("body")])


def test_splitting_needs_the_cut(model):
    with pytest.raises(PassError, match=r"pass 'split_model' \(after none\): the cut is not marked; run find_cut first"):
        run_passes(model, [SplitModel()])


def test_an_error_names_the_failing_pass_and_those_before(model):
    with pytest.raises(PassError, match=rf"^pass 'find_cut' \(after {BEFORE_CUT}\): no node"):
        run_passes(model, split_at("nowhere"))


def test_a_block_that_does_not_lead_to_the_output_is_refused():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, latents):
            self.idle(latents)
            return self.used(latents)

    model = capture_model(Detour().eval(), {"latents": example_inputs()["latents"]})
    with pytest.raises(PassError, match="block 'idle'"):
        run_passes(model, split_at("idle"))
