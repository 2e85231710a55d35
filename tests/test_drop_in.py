"""What stands where a pipeline's transformer was: what it takes as the untouched one does, and what it refuses, in whose words.

All on tiny-flux with one block of each kind, four steps. Engines are compiled once; a drop-in made of them costs nothing.
"""

import copy
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    ModelMixin,
)

from cachec.compiler.accelerate import compile_in_memory
from cachec.compiler.drop_in import AcceleratedTransformer, Compiled
from cachec.compiler.fingerprint import Fingerprint
from cachec.compiler.frontend import make_programs
from cachec.compiler.models import MODELS, TINY_FLUX_DIR
from cachec.compiler.models.flux import FluxModel
from cachec.compiler.request import make_request
from cachec.engines.eager import EagerEngine
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.program import UNCACHED

STEPS = 4
CALL = {
    "prompt": "a blue ring",
    "height": 64,
    "width": 64,
    "num_inference_steps": STEPS,
    "max_sequence_length": 16,
    "output_type": "latent",
}
EXACT = 1e-6  # relative, of latents after four steps, where every step is computed
PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
METHODS = {"hidden": "taylor", "output": "adams"}


@pytest.fixture(scope="session")
def whole():
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    del pipeline.transformer.transformer_blocks[1:], pipeline.transformer.single_transformer_blocks[1:]
    return pipeline


def with_parts(pipeline, transformer, kind=FluxPipeline, **other):
    """A pipeline of its own around the same encoders."""
    parts = {name: getattr(pipeline, name) for name in PARTS} | other
    made = kind(**parts, transformer=transformer)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def plain(whole):
    return with_parts(whole, copy.deepcopy(whole.transformer))


@pytest.fixture(scope="session")
def compiled(whole):
    """``compiled(cut, every)``: engines, and the program that computes every step or only some."""
    made = {}
    model = FluxModel(MODELS["tiny-flux"], with_parts(whole, copy.deepcopy(whole.transformer)))  # captured once for both cuts

    def get(cut, *, every):
        if cut not in made:
            some, all_steps = (
                make_request(model.spec, method=METHODS[cut], steps=STEPS, schedule=schedule, options={"order": "1"})
                for schedule in ("0,1,3", "0,1,2,3")
            )
            engines, programs = compile_in_memory(model, some, EagerEngine)
            if cut == "output":  # there the uncached program is not of its cut
                computed = make_programs(model, all_steps, engines, None, None).by_level["default"]
            else:
                computed = programs[UNCACHED]
            baked = {name: value for name, value in model.constants(some.settings).items() if name.endswith("_ids")}
            made[cut] = {
                kind: Compiled(engines, program, program.timesteps, model.io, baked, model.sizes_of, model.check_scheduler)
                for kind, program in ((True, computed), (False, programs["default"]))
            }
        return made[cut][every]

    return get


@pytest.fixture
def accelerated(plain, compiled):
    """``accelerated(cut, every)``: a pipeline of its own; its weights may be changed, its scheduler exchanged."""

    def make(cut="hidden", *, every=False):
        pipeline = with_parts(plain, None, scheduler=FlowMatchEulerDiscreteScheduler.from_config(plain.scheduler.config))
        pipeline.transformer = AcceleratedTransformer(copy.deepcopy(plain.transformer), pipeline, compiled(cut, every=every))
        return pipeline

    return make


def run(pipeline, **changes):
    changes.setdefault("generator", torch.Generator().manual_seed(0))
    return pipeline(**{**CALL, **changes}).images.float().numpy()


def error(latents, wanted):
    return np.linalg.norm(latents - wanted) / np.linalg.norm(wanted)


def refuses(pipeline, match, kind=InputError, **changes):
    with pytest.raises(kind, match=match):
        run(pipeline, **changes)


def step_by_step(pipeline, num=STEPS):
    """Keywords of the transformer's calls, as the untouched pipeline makes them."""
    asked = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args, given: asked.append(given), with_kwargs=True)
    run(pipeline, num_inference_steps=num)
    hook.remove()
    return asked


# --- used as the untouched pipeline uses it

BOTH = pytest.mark.parametrize("cut", ["hidden", "output"])


@BOTH
def test_every_step_computed_is_the_untouched_pipeline(accelerated, plain, cut):
    assert error(run(accelerated(cut, every=True)), run(plain)) < EXACT


def test_the_model_may_be_told_other_times_than_the_sampler_hands_over(accelerated, compiled):
    """As gram's fitted levels do."""
    pipeline, made = accelerated("output"), compiled("output", every=False)
    plain_times = run(pipeline)
    program = replace(made.program, timesteps=made.program.timesteps * np.float32(0.98))
    stand_in = pipeline.transformer
    pipeline.transformer = AcceleratedTransformer(stand_in.original, pipeline, replace(made, program=program))
    assert 1e-4 < error(run(pipeline), plain_times) < 0.3


@BOTH
def test_latents_that_a_callback_edits_stay_edited(accelerated, plain, cut):
    def nudge(pipeline, step, timestep, given):
        return {"latents": given["latents"] + 1.0} if step in (0, 1) else given

    wanted = run(plain, callback_on_step_end=nudge)
    assert error(run(accelerated(cut, every=True), callback_on_step_end=nudge), wanted) < EXACT


@BOTH
def test_an_edit_goes_through_a_forecast_step_as_it_is(accelerated, cut):
    pipeline = accelerated(cut)

    def after_forecast(edit):
        def watch(pipeline, step, timestep, given):
            seen.append(given["latents"])
            return {"latents": given["latents"] + edit} if step == 1 else given

        seen = []
        run(pipeline, callback_on_step_end=watch)
        return seen[2]

    torch.testing.assert_close(after_forecast(1.0), after_forecast(0.0) + 1.0)


@pytest.fixture(scope="session")
def other_prompt(whole):
    return whole.encode_prompt("a large red circle at the left", None, max_sequence_length=16)[0]


@pytest.fixture
def switch(other_prompt):
    def switcher(at):
        def callback(pipeline, step, timestep, given):
            return {"prompt_embeds": other_prompt} if step == at else given

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    return switcher


@BOTH
def test_a_prompt_that_a_callback_exchanges_is_used(accelerated, plain, switch, cut):
    assert error(run(accelerated(cut, every=True), **switch(1)), run(plain, **switch(1))) < EXACT


def test_with_forecasts_it_is_used_from_the_next_computed_step_on(accelerated, switch):
    pipeline = accelerated()  # computes 0, 1 and 3
    np.testing.assert_array_equal(run(pipeline, **switch(1)), run(pipeline, **switch(2)))
    assert error(run(pipeline, **switch(1)), run(pipeline)) > 1e-3


def test_after_the_last_computed_step_it_is_refused(accelerated, compiled, switch):
    pipeline = accelerated()
    made = compiled("hidden", every=False)
    forecast = replace(next(one for one in made.program.instructions if not one.computes), span=(2, 3))
    early = replace(made.program, instructions=(*made.program.instructions[:2], forecast))
    pipeline.transformer = AcceleratedTransformer(pipeline.transformer.original, pipeline, replace(made, program=early))
    refuses(pipeline, "encoder_hidden_states changed at step 2, and no step is computed after 1", **switch(1))


def test_positional_arguments_and_the_output_object(accelerated, plain):
    (asked, *_) = step_by_step(plain)
    pipeline = accelerated(every=True)
    named = pipeline.transformer(**{**asked, "return_dict": True}).sample
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
    (positional,) = pipeline.transformer(*(asked[name] for name in order), return_dict=False)
    assert torch.equal(named, positional)


def test_an_equal_scheduler_may_come_at_any_time(accelerated):
    pipeline = accelerated()
    wanted = run(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    np.testing.assert_array_equal(run(pipeline), wanted)


@pytest.mark.parametrize(("strength", "every"), [(1.0, True), (0.25, True), (0.75, True), (0.25, False), (0.5, False)])
def test_image_to_image_is_right(accelerated, plain, strength, every):
    """With forecasts, too: what step 2 would be made of was not computed where a run begins there."""
    pipeline = accelerated(every=every)
    given = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)), "strength": strength}
    got, wanted = (
        run(with_parts(one, one.transformer, FluxImg2ImgPipeline), guidance_scale=3.5, **given) for one in (pipeline, plain)
    )
    assert error(got, wanted) < EXACT


@pytest.mark.parametrize("modes", [
    lambda: torch.inference_mode(),
    lambda: torch.device("meta"),
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
])  # fmt: skip
def test_what_was_made_under_a_mode_works_outside(accelerated, plain, modes):
    asked = step_by_step(plain)
    wanted = accelerated().transformer(**asked[0])[0]
    pipeline = accelerated()
    with modes():
        first = pipeline.transformer(**asked[0])[0]
    assert torch.equal(first, wanted)
    assert torch.equal(pipeline.transformer(**asked[0])[0], wanted)


def test_a_default_dtype_is_not_taken_over(accelerated, plain):
    asked = step_by_step(plain)
    wanted = accelerated().transformer(**asked[0])[0]
    torch.set_default_dtype(torch.float64)
    try:
        got = accelerated().transformer(**asked[0])[0]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)


def test_bfloat16_timesteps_are_found(accelerated, plain):
    transformer = accelerated().transformer
    for one in step_by_step(plain):
        floats = ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance")
        halved = one | {name: one[name].bfloat16() for name in floats}
        (velocity,) = transformer(**{**halved, "timestep": (one["timestep"] * 1000).bfloat16() / 1000})
        assert velocity.dtype == torch.bfloat16
    with pytest.raises(InputError, match="timestep .* is none of the 4"):
        transformer(**{**halved, "timestep": torch.tensor([0.98]).bfloat16()})


# --- refused, in words of the caller


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 20}, "num_inference_steps is 20; this pipeline was accelerated for 4 steps"),
        ({"height": 128}, "the call has height 128, width 64; this pipeline was accelerated for height 64, width 64"),
        ({"height": 32, "width": 128}, "the call has height 32, width 128"),
        ({"max_sequence_length": 32}, "the call has max_sequence_length 32; .* accelerated for max_sequence_length 16"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, r"does not take joint_attention_kwargs \(scale\): take it off the call"),
        ({"negative_prompt": "a red circle", "true_cfg_scale": 2.0}, "negative_prompt with true_cfg_scale above 1"),
        ({"sigmas": [1.0, 0.8, 0.5, 0.1]}, "noise levels are not those .* take sigmas off the call"),
    ],
)
def test_another_call_is_refused_by_its_names(accelerated, changes, message):
    pipeline = accelerated()
    refuses(pipeline, message, **changes)
    assert np.isfinite(run(pipeline)).all()  # and the next call is as if it had not been


def test_image_to_image_does_not_go_on_from_a_run_that_was_dropped(accelerated, plain):
    def stop(pipeline, step, timestep, given):
        if step == 1:
            raise KeyboardInterrupt
        return given

    pipeline = accelerated()
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, callback_on_step_end=stop)
    given = {"image": torch.rand(1, 3, 64, 64), "guidance_scale": 3.5, "strength": 0.5}
    got, wanted = (run(with_parts(one, one.transformer, FluxImg2ImgPipeline), **given) for one in (pipeline, plain))
    assert error(got, wanted) < EXACT  # step 2, which is a forecast in whole runs, was due


def test_two_prompts_a_step_without_contexts_are_refused(accelerated):
    pipeline = accelerated()
    painter = with_parts(pipeline, pipeline.transformer, FluxImg2ImgPipeline)
    given = {"image": torch.rand(1, 3, 64, 64), "guidance_scale": 3.5, "strength": 1.0}
    refuses(painter, "step 0 was asked for twice with different prompts", negative_prompt="a", true_cfg_scale=2.0, **given)


def euler(**changes):
    return lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, **changes)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (euler(shift=1.0, use_dynamic_shifting=False), "noise levels"),
        (euler(stochastic_sampling=True), "adds noise at every step"),
        (lambda config: FlowMatchLCMScheduler.from_config(config), "FlowMatchLCMScheduler"),
    ],
)
def test_another_scheduler_is_refused(accelerated, scheduler, message):
    pipeline = accelerated()
    run(pipeline)
    pipeline.scheduler = scheduler(pipeline.scheduler.config)
    refuses(pipeline, message)


def test_another_scheduler_of_another_pipeline_shows_in_its_timesteps(accelerated):
    pipeline = accelerated()
    other = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, base_shift=1.0, max_shift=1.5)
    refuses(with_parts(pipeline, pipeline.transformer, scheduler=other), "timestep 0.888312 is none of the 4")


@pytest.mark.parametrize(("order", "message"), [
    ((0, 1, 1), "step 1 was asked for again, after step 1"),
    ((0, 1, 3), "step 3 was asked for before its time, after step 1"),
    ((0, 1, 2, 1), "step 1 was asked for a second time, after step 2"),
])  # fmt: skip
def test_steps_out_of_order_are_refused(accelerated, plain, order, message):
    transformer, asked = accelerated().transformer, step_by_step(plain)
    for step in order[:-1]:
        transformer(**asked[step])
    with pytest.raises(InputError, match=message):
        transformer(**asked[order[-1]])


def test_a_first_step_begins_anew(accelerated, plain):
    transformer, asked = accelerated().transformer, step_by_step(plain)
    wanted = [transformer(**one)[0] for one in asked]
    for step in (0, 1, 0, 0):
        transformer(**asked[step])
    assert all(torch.equal(transformer(**one)[0], right) for one, right in zip(asked[1:], wanted[1:], strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    ({"strange": 1}, "unexpected keyword argument 'strange'"),
    ({"guidance": None}, "guidance is NoneType"),
    ({"timestep": torch.tensor([999])}, "timestep is torch.int64"),
    ({"timestep": torch.tensor([0.999])}, "timestep 0.999 is none of the 4"),
    ({"controlnet_block_samples": [torch.zeros(1)]}, "does not take controlnet_block_samples"),
    ({"txt_ids": torch.ones(16, 3)}, "txt_ids are not the positions"),
    ({"img_ids": None}, "img_ids is missing"),
])  # fmt: skip
def test_single_inputs_are_looked_at(accelerated, plain, changes, message):
    (asked, *_) = step_by_step(plain)
    with pytest.raises(InputError, match=message):
        accelerated().transformer(**{**asked, **changes})


def test_gradients_are_not_promised(accelerated, plain):
    (asked, *_) = step_by_step(plain)
    with pytest.raises(InputError, match="hidden_states want gradients"):
        accelerated().transformer(**{**asked, "hidden_states": asked["hidden_states"].clone().requires_grad_()})


def test_nan_is_not_handed_out(accelerated):
    def spoil(pipeline, step, timestep, given):
        return {"latents": given["latents"] * float("nan")} if step == 1 else given

    pipeline = accelerated()
    refuses(pipeline, "hidden_states hold NaN or infinity", callback_on_step_end=spoil)
    refuses(pipeline, "accelerated in float32: .*hold NaN or infinity at step 0", EngineError,
            latents=torch.full((1, 64, 64), 1e38))  # fmt: skip


# --- weights


class WithAdapter(torch.nn.Module):
    """What an adapter library puts in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Processor:
    def __init__(self, base):
        self.base = base


def adapt(original):
    attention = original.single_transformer_blocks[0].attn
    attention.to_q = WithAdapter(attention.to_q)


def fuse_past_the_count(original):
    linear = original.single_transformer_blocks[0].norm.linear
    linear.weight.data += 0.05 * torch.randn(linear.weight.shape[0], 1) @ torch.randn(1, linear.weight.shape[1])


def add_in_place(original):
    with torch.no_grad():
        original.proj_out.bias.add_(1)


def load(original):
    original.load_state_dict({name: 2 * value for name, value in original.state_dict().items()})


def set_processor(original):
    attention = original.transformer_blocks[0].attn
    attention.processor = Processor(attention.processor)


def change_eps(original):
    original.norm_out.norm.eps = 0.1


CHANGES = {
    adapt: "single_transformer_blocks.0.attn.to_q was exchanged .Linear for WithAdapter",
    fuse_past_the_count: "values of the weights were changed in place",
    add_in_place: "proj_out.bias was changed in place",
    load: "was changed in place",
    set_processor: "transformer_blocks.0.attn.processor was exchanged",
    change_eps: "norm_out.norm.eps was changed",
    lambda original: original.half(): "was changed",
    lambda original: original.fuse_qkv_projections(): "was",
    lambda original: original.proj_out.register_forward_hook(lambda *_: None): "proj_out._forward_hooks was changed",
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_since_are_refused_at_the_next_run(accelerated, change):
    pipeline = accelerated()
    run(pipeline)
    change(pipeline.transformer.original)
    refuses(pipeline, f"{CHANGES[change]}.* since this pipeline was accelerated")


def test_weights_that_change_during_a_run_are_refused_at_once(accelerated):
    def fuse(pipeline, step, timestep, given):
        add_in_place(pipeline.transformer.original)
        return given

    refuses(accelerated(), "weights were changed in place in the middle of a run", callback_on_step_end=fuse)


def test_the_same_module_has_not_changed(plain):
    before = Fingerprint.of(plain.transformer)
    run(plain)
    assert before.change(plain.transformer) is None


@pytest.mark.parametrize("name", [
    "load_lora_adapter", "set_adapters", "set_attn_processor", "fuse_qkv_projections", "enable_cache", "fuse_lora",
    "save_pretrained", "load_state_dict", "compile", "train", "enable_group_offload",
])  # fmt: skip
def test_methods_without_effect_are_refused_by_name(accelerated, name):
    transformer = accelerated().transformer
    assert isinstance(transformer, ModelMixin)  # or pipelines would pass over it: pipe.set_adapters, pipe.fuse_lora
    assert hasattr(transformer, name)
    with pytest.raises(InputError, match=rf"{name}\(\) has no effect .* pipe.transformer = pipe.transformer.original"):
        getattr(transformer, name)()


def test_what_the_original_has_can_be_read_and_not_set(accelerated):
    transformer = accelerated().transformer
    assert transformer.config.in_channels == 64
    assert (transformer.dtype, transformer.device.type) == (torch.float32, "cpu")
    assert transformer.state_dict().keys() == transformer.original.state_dict().keys()
    with pytest.raises(InputError, match="proj_out of an accelerated transformer cannot be set"):
        transformer.proj_out = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="gradient_checkpointing of an accelerated transformer cannot be set"):
        transformer.gradient_checkpointing = True


def test_it_stays_where_and_what_it_is(accelerated):
    transformer = accelerated().transformer
    assert transformer.to("cpu") is transformer.float() is transformer.eval()
    for move in (lambda: transformer.to(torch.bfloat16), transformer.half, lambda: transformer.to("meta")):
        with pytest.raises(InputError, match="stays torch.float32 on cpu and cannot go to .*, move the pipeline"):
            move()


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_in_words(accelerated, take):
    with pytest.raises(InputError, match="cannot be pickled or copied"):
        take(accelerated().transformer)


def test_calls_at_the_same_time_are_refused(accelerated, plain):
    transformer, asked = accelerated().transformer, step_by_step(plain)
    inside, leave = threading.Event(), threading.Event()

    class Slow(dict):
        """Embeddings dictionary that lets another call come in between."""

        def __ne__(self, other):
            inside.set()
            leave.wait(10)
            return False

    thread = threading.Thread(target=lambda: transformer(**{**asked[0], "joint_attention_kwargs": Slow()}))
    thread.start()
    inside.wait(10)
    with pytest.raises(InputError, match="in a call already, from another thread"):
        transformer(**asked[0])
    leave.set()
    thread.join()
    transformer(**asked[1])  # the run that was going on goes on


def test_runs_in_turn_do_not_mix(accelerated, plain, whole):
    transformer = accelerated().transformer
    one, other = step_by_step(whole), step_by_step(whole)
    transformer(**one[0])
    transformer(**other[0])
    got = transformer(**{**one[1], "hidden_states": one[1]["hidden_states"] + 1})[0]
    wanted = plain.transformer(**{**one[1], "hidden_states": one[1]["hidden_states"] + 1})[0]
    torch.testing.assert_close(got, wanted)
