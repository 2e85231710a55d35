import pytest
import torch
from toy import example_inputs
from toy_bundle import LAST_BLOCK, eager_velocity
from toy_runs import split_at

from cachec.passes import SplitModel, graph_text, run_passes
from cachec.passes.base import placeholders
from cachec.runtime.abi import COMPUTE, FORECAST, MODEL
from cachec.runtime.errors import PassError


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


def test_splitting_needs_the_cut(model):
    with pytest.raises(PassError, match=r"pass 'split_model' \(after none\): the cut is not marked; run find_cut first"):
        run_passes(model, [SplitModel()])
