"""What pipelines hand their transformers, seen by a spy: arguments by name, contexts, timesteps."""

import copy

import pytest
import torch

from cachec.compiler.models.observed import observe
from cachec.compiler.tables.sampler_probe import probe_sampler
from cachec.runtime.errors import InputError
from tests.families import FAMILIES


def run(name, **changes):
    family = next(family for family in FAMILIES if family.name == name)
    pipeline = family.make()
    call = {key: value for key, value in {**family.call, **changes}.items() if value is not None}
    parts = {part: getattr(pipeline, part) for part in family.transformers}
    return pipeline, observe(pipeline, parts, call), call


def test_every_call_of_a_run_is_seen_and_the_pipeline_is_left_alone():
    pipeline, seen, call = run("qwen-image", true_cfg_scale=4.0)
    assert [(one.step, one.context) for one in seen.calls] == [(i, c) for i in range(3) for c in ("cond", "uncond")]
    assert set(seen.first) >= {"hidden_states", "timestep", "encoder_hidden_states", "img_shapes"}
    assert "guidance" not in seen.first  # it was None
    told = torch.stack([value[0] for value in seen.at_each_step("timestep")])
    assert torch.equal(told, seen.scheduler.timesteps / 1000)
    assert probe_sampler(seen.scheduler).is_euler
    assert "step" not in vars(seen.scheduler)
    assert pipeline.scheduler.step_index is None
    assert not hasattr(pipeline.scheduler, "num_inference_steps")  # as before
    state = torch.get_rng_state()
    observe(pipeline, {"transformer": pipeline.transformer}, {**call, "generator": torch.Generator()}, whole=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_positional_arguments_and_lists_have_names():
    assert run("pixart-sigma", guidance_scale=1.0)[1].first["hidden_states"].shape[0] == 1
    latents = run("z-image")[1].first["x"]
    assert isinstance(latents, list)


def test_a_run_ends_behind_its_first_step_where_no_more_is_wanted():
    pipeline, seen, call = run("flux")
    few = observe(pipeline, {"transformer": pipeline.transformer}, call, whole=False)
    assert [one.step for one in few.calls] == [0]
    assert len(seen.calls) == 3
    assert few.first.keys() == seen.first.keys()


def test_a_transformer_without_values_is_enough_and_both_experts_are_told_apart():
    family = next(family for family in FAMILIES if family.name == "wan-2.2")
    pipeline = family.make()
    parts = {part: copy.deepcopy(getattr(pipeline, part)).to("meta") for part in family.transformers}
    pipeline.transformer = pipeline.transformer_2 = None
    called = [one.part for one in observe(pipeline, parts, family.call).calls]
    assert set(called) == set(family.transformers)
    assert called == sorted(called)


def test_what_a_pipeline_refuses_is_said_in_its_words():
    with pytest.raises(InputError, match="FluxPipeline does not take this call: .*max_sequence_length"):
        run("flux", max_sequence_length=4096)
