"""What stands where a pipeline's transformer was: it answers as the untouched one does, and says what has no effect."""

import copy
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from drop_in_flux import BOTH, EXACT, STEPS, error, refuses, run, step_by_step

from cachec.compiler.drop_in.transformer import AcceleratedTransformer
from cachec.compiler.fingerprint import Fingerprint
from cachec.runtime.errors import InputError
from cachec.runtime.stepper import Stepper


@BOTH
def test_every_step_computed_is_the_untouched_pipeline(accelerated, plain, cut):
    assert error(run(accelerated(cut, every=True)), run(plain)) < EXACT


def with_program(pipeline, compiled, cut, change):
    """The pipeline with a drop-in that plays a changed program on the same engines."""
    made = compiled(cut, every=False)
    program, engines = change(made.forms[0].program), compiled(cut, every="engines")

    def open_stepper(batch, text, start, branch):
        return Stepper(engines, program, made.model.io, batch=batch)

    form = replace(made.forms[0], program=program, open=open_stepper)
    pipeline.transformer = AcceleratedTransformer(pipeline.transformer.original, pipeline, replace(made, forms=[form]))
    return pipeline


def test_the_model_may_be_told_other_times_than_the_sampler_hands_over(accelerated, compiled):
    """As gram's fitted levels do."""
    pipeline = accelerated("output")
    plain_times = run(pipeline)
    with_program(pipeline, compiled, "output", lambda one: replace(one, timesteps=one.timesteps * np.float32(0.98)))
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


@BOTH
def test_a_prompt_that_a_callback_exchanges_is_used(accelerated, plain, switch, cut):
    assert error(run(accelerated(cut, every=True), **switch(1)), run(plain, **switch(1))) < EXACT


@BOTH
def test_with_forecasts_it_is_used_at_once(accelerated, plain, switch, cut):
    """Steps are computed up to the next one that the program computes (0, 1 and 3): here all."""
    assert error(run(accelerated(cut), **switch(1)), run(plain, **switch(1))) < EXACT


def test_after_the_last_computed_step_it_is_used_at_once(accelerated, compiled, plain, switch):
    def change(program):
        forecast = replace(next(one for one in program.instructions if not one.computes), span=(2, 3))
        rows = program.coefficients.copy()
        rows[3] = rows[2]
        return replace(program, instructions=(*program.instructions[:2], forecast), coefficients=rows)

    pipeline = with_program(accelerated(), compiled, "hidden", change)
    assert error(run(pipeline, **switch(1)), run(plain, **switch(1))) < EXACT


def test_positional_arguments_and_the_output_object(accelerated, plain):
    (asked, *_) = step_by_step(plain)
    pipeline = accelerated(every=True)
    named = pipeline.transformer(**{**asked, "return_dict": True}).sample
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
    (positional,) = pipeline.transformer(*(asked[name] for name in order), return_dict=False)
    assert torch.equal(named, positional)


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
    assert transformer._runs.run.branches[0].step == STEPS - 1


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
        """Keywords that let another call come in between."""

        def values(self):
            inside.set()
            leave.wait(10)
            return []

    thread = threading.Thread(target=lambda: transformer(**{**asked[0], "joint_attention_kwargs": Slow()}))
    thread.start()
    inside.wait(10)
    with pytest.raises(InputError, match="in a call already, from another thread"):
        transformer(**asked[0])
    leave.set()
    thread.join()
    transformer(**asked[1])  # the run that was going on goes on
