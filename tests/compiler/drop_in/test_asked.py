"""What a call has that was not compiled is refused in that call, in words of the caller."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from drop_in_flux import refuses, run, step_by_step

from cachec.runtime.errors import EngineError, InputError

# --- refused, in words of the caller


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 64}, "the call has height 64, width 128; this pipeline was accelerated for height 128, width 128"),
        ({"height": 32, "width": 128}, "the call has height 32, width 128"),
        ({"max_sequence_length": 32}, "the call has max_sequence_length 32; .* accelerated for max_sequence_length 24"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, r"does not take joint_attention_kwargs \(scale\): take it off the call"),
    ],
)
def test_another_call_is_refused_by_its_names(accelerated, changes, message):
    pipeline = accelerated()
    refuses(pipeline, message, **changes)
    assert np.isfinite(run(pipeline)).all()  # and the next call is as if it had not been


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler, "draws noise at its steps"),
        (FlowMatchLCMScheduler, "FlowMatchLCMScheduler"),
    ],
)
def test_another_scheduler_is_refused(accelerated, scheduler, message):
    pipeline = accelerated()
    run(pipeline)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, stochastic_sampling=True)
    refuses(pipeline, message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"strange": 1}, "unexpected keyword argument 'strange'"),
    ({"guidance": None}, "guidance is missing: the transformer was compiled with it"),
    ({"timestep": torch.tensor([0.5, 0.6])}, "the timesteps of one call differ: 0.5, 0.6"),
    ({"encoder_hidden_states": torch.zeros(1, 12, 64)}, r"a text of 12 tokens, where 24"),
    ({"controlnet_block_samples": [torch.zeros(1)]}, "does not take controlnet_block_samples"),
    ({"txt_ids": torch.ones(24, 3)}, "txt_ids are not those that this pipeline was accelerated for"),
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
