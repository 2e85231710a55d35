"""What the tests of the drop-in share: tiny-flux with one block of each kind, four steps."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from cachec.runtime.errors import InputError

STEPS = 4
CALL = {
    "prompt": "a sad face",
    "height": 128,
    "width": 128,
    "num_inference_steps": STEPS,
    "max_sequence_length": 24,
    "output_type": "latent",
}
EXACT = 3e-6  # relative, of latents after a few steps, where every step is computed
PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
BOTH = pytest.mark.parametrize("cut", ["hidden", "output"])


def with_parts(pipeline, transformer, kind=FluxPipeline, **other):
    """A pipeline of its own around the same encoders."""
    parts = {name: getattr(pipeline, name) for name in PARTS} | other
    made = kind(**parts, transformer=transformer)
    made.set_progress_bar_config(disable=True)
    return made


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
