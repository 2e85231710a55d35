"""Whose call is it: steps that no program has, branches of guidance, runs that begin late or were dropped."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from drop_in_flux import BOTH, EXACT, error, run, step_by_step, with_parts

# --- what no program has is computed


def both(accelerated, plain, cut="hidden", *, every=False, kind=FluxPipeline, **changes):
    """Latents of the accelerated pipeline, and of the untouched one."""
    pipeline = accelerated(cut, every=every)
    changes = {"guidance_scale": 3.5, **changes}
    return [run(with_parts(one, one.transformer, kind), **changes) for one in (pipeline, plain)]


@BOTH
@pytest.mark.parametrize("changes", [{"num_inference_steps": 6}, {"num_inference_steps": 2}, {"sigmas": [1.0, 0.8, 0.5, 0.1]}])
def test_other_steps_are_computed_with_one_warning(accelerated, plain, caplog, cut, changes):
    pipeline = accelerated(cut)
    caplog.clear()
    with caplog.at_level("WARNING", "cachec"):
        assert error(run(pipeline, **changes), run(plain, **changes)) < EXACT
    (warning,) = caplog.messages
    assert "num_inference_steps is" in warning or "noise level" in warning
    assert "Accelerate for them" in warning
    assert error(run(pipeline), run(plain)) > 1e-3  # its own steps are forecast as ever


def euler(**changes):
    return lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, **changes)


@BOTH
def test_another_scheduler_is_seen(accelerated, plain, caplog, cut):
    pipeline = accelerated(cut)
    run(pipeline)
    for one in (pipeline, plain):
        one.scheduler = euler(shift=1.0, use_dynamic_shifting=False)(one.scheduler.config)
    with caplog.at_level("WARNING", "cachec"):
        assert error(run(pipeline), run(plain)) < EXACT
    assert "the scheduler has another use_dynamic_shifting" in caplog.text


def test_another_scheduler_of_another_pipeline_shows_in_its_timesteps(accelerated, plain, caplog):
    other = euler(base_shift=1.0, max_shift=1.5)(plain.scheduler.config)
    pipeline = accelerated()
    with caplog.at_level("WARNING", "cachec"):
        got, wanted = (run(with_parts(one, one.transformer, scheduler=copy.deepcopy(other))) for one in (pipeline, plain))
    assert error(got, wanted) < EXACT
    assert "time 0.888312 is none of the 4 steps" in caplog.text


# --- branches of guidance

GUIDED = {"negative_prompt": "a bald person", "true_cfg_scale": 2.0}


@BOTH
def test_both_prompts_of_true_guidance_have_slots_of_their_own(accelerated, plain, cut):
    got, wanted = both(accelerated, plain, cut, every=True, **GUIDED)
    assert error(got, wanted) < EXACT
    pipeline = accelerated(cut)
    got = run(pipeline, guidance_scale=3.5, **GUIDED)
    assert error(got, wanted) > 1e-3
    np.testing.assert_array_equal(run(pipeline, guidance_scale=3.5, **GUIDED), got)
    same = run(pipeline, negative_prompt="a sad face", true_cfg_scale=2.0)  # u + 2 (c - u) is c
    assert error(same, run(pipeline)) < EXACT


def test_branches_without_contexts_are_told_apart_by_their_prompts(accelerated, plain):
    given = {"image": torch.rand(1, 3, 128, 128), "strength": 0.75, "kind": FluxImg2ImgPipeline, **GUIDED}
    got, wanted = both(accelerated, plain, every=True, **given)
    assert error(got, wanted) < EXACT
    given["strength"] = 1.0
    with_contexts = run(accelerated(), guidance_scale=3.5, latents=torch.zeros(1, 64, 64), **GUIDED)
    (got, _) = both(accelerated, plain, latents=torch.zeros(1, 64, 64), **given)
    np.testing.assert_allclose(got, with_contexts, atol=1e-5)


def test_a_prompt_that_is_exchanged_goes_to_its_branch(accelerated, plain, switch):
    got, wanted = both(accelerated, plain, every=True, **GUIDED, **switch(1))
    assert error(got, wanted) < EXACT


@pytest.mark.parametrize(("strength", "every"), [(1.0, True), (0.25, True), (0.75, True), (0.25, False), (0.5, False)])
def test_image_to_image_is_right(accelerated, plain, strength, every):
    """With forecasts, too: what step 2 would be made of was not computed where a run begins there."""
    pipeline = accelerated(every=every)
    given = {"image": torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(5)), "strength": strength}
    got, wanted = (
        run(with_parts(one, one.transformer, FluxImg2ImgPipeline), guidance_scale=3.5, **given) for one in (pipeline, plain)
    )
    assert error(got, wanted) < EXACT


def repeating(transformer, cut, branches):
    """The untouched transformer, which at the second of three steps has what was kept at the first."""
    calls = []

    def before(_, args):
        calls.append(args)
        return (calls[len(calls) - 1 - branches][0], *args[1:]) if branches < len(calls) <= 2 * branches else None

    def behind(_, args, output):
        calls.append(output)
        return calls[len(calls) - 1 - branches] if branches < len(calls) <= 2 * branches else None

    if cut == "hidden":
        transformer.norm_out.register_forward_pre_hook(before)
    else:
        transformer.register_forward_hook(behind)
    return transformer


@BOTH
@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["one branch", "both branches"])
def test_image_to_image_is_forecast_by_numbers_for_its_beginning(accelerated, plain, cut, guided):
    """Whole runs compute steps 0, 1 and 3; one that begins at step 1 computes 1 and 3, and so do its branches of guidance."""
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    given = {"image": image, "strength": 0.75, "guidance_scale": 3.5, **guided}
    pipeline = accelerated(cut)
    run(pipeline)
    other = with_parts(pipeline, pipeline.transformer, FluxImg2ImgPipeline)
    got = run(other, **given)
    begun = pipeline.transformer._runs.steppers.values()
    assert [one.program.compute_steps for one in begun] == [(1, 3)] * (2 if guided else 1)
    wanted = run(with_parts(plain, repeating(plain.transformer, cut, len(begun)), FluxImg2ImgPipeline), **given)
    assert error(got, wanted) < EXACT
    np.testing.assert_array_equal(run(other, **given), got)


def test_image_to_image_does_not_go_on_from_a_run_that_was_dropped(accelerated, plain):
    def stop(pipeline, step, timestep, given):
        if step == 1:
            raise KeyboardInterrupt
        return given

    pipeline = accelerated()
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, callback_on_step_end=stop)
    given = {"image": torch.rand(1, 3, 128, 128), "guidance_scale": 3.5, "strength": 0.5}
    got, wanted = (run(with_parts(one, one.transformer, FluxImg2ImgPipeline), **given) for one in (pipeline, plain))
    assert error(got, wanted) < EXACT  # step 2, which is a forecast in whole runs, was due


@pytest.mark.parametrize("order", [(0, 1, 1), (0, 1, 3), (0, 1, 2, 1), (2,), (0, 1, 3, 2)])
@BOTH
def test_a_step_that_was_not_due_is_computed(accelerated, plain, cut, order):
    transformer, asked = accelerated(cut).transformer, step_by_step(plain)
    for step in order[:-1]:
        transformer(**asked[step])
    torch.testing.assert_close(transformer(**asked[order[-1]]), plain.transformer(**asked[order[-1]]), atol=1e-5, rtol=1e-5)


def test_a_first_step_begins_anew(accelerated, plain):
    transformer, asked = accelerated().transformer, step_by_step(plain)
    wanted = [transformer(**one)[0] for one in asked]
    for step in (0, 1, 0, 0):
        transformer(**asked[step])
    assert all(torch.equal(transformer(**one)[0], right) for one, right in zip(asked[1:], wanted[1:], strict=True))


def test_runs_in_turn_do_not_mix(accelerated, plain, whole):
    transformer = accelerated().transformer
    one, other = step_by_step(whole), step_by_step(whole)
    transformer(**one[0])
    transformer(**other[0])
    got = transformer(**{**one[1], "hidden_states": one[1]["hidden_states"] + 1})[0]
    wanted = plain.transformer(**{**one[1], "hidden_states": one[1]["hidden_states"] + 1})[0]
    torch.testing.assert_close(got, wanted)


def test_an_equal_scheduler_may_come_at_any_time(accelerated):
    pipeline = accelerated()
    wanted = run(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    np.testing.assert_array_equal(run(pipeline), wanted)
