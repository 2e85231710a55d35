"""Pipelines that no family knows: compiled by what can be seen of them, asked for what cannot, or refused."""

import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.compiler.models.generic import GenericModel
from cachec.compiler.models.inferred import block_lists, find_cut
from cachec.runtime.abi import COMPUTE, VELOCITY
from cachec.runtime.errors import InputError
from tests import families
from tests.families import HEAD, HEADS, WIDTH, assemble, make_tokenizer

SETTINGS = Settings(height=32, width=48, text_tokens=24, guidance=3.0, steps=3, dtype="float32")


@pytest.fixture(scope="module")
def aura(tmp_path_factory):
    """AuraFlow: guidance as a batch of two, two lists of blocks."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=HEAD, num_attention_heads=HEADS,
        joint_attention_dim=WIDTH, caption_projection_dim=HEADS * HEAD, pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = assemble(
        diffusers.AuraFlowPipeline,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=families._vae(4),
        text_encoder=families._t5("UMT5"),
        tokenizer=make_tokenizer(ends=True),
    )
    directory = tmp_path_factory.mktemp("aura")
    pipeline.save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:  # the example of a family from outside knows it
        patch.setattr(sys, "path", [one for one in sys.path if not list(Path(one).glob("cachec_auraflow*.dist-info"))])
        spec = find_model(str(directory))
        assert (spec.steps, spec.height, spec.text_tokens) == (50, 1024, 256)
        return load_model(replace(spec, height=32, width=48))


def test_a_pipeline_that_no_family_knows_is_captured_at_the_cut_that_is_named(aura):
    assert isinstance(aura, GenericModel)
    assert aura.io.conditions == ("encoder_hidden_states",)
    settings = replace(SETTINGS, cut="single_transformer_blocks.1")
    compute = Values("cpu").module(prepare(aura, settings).modules[COMPUTE])
    inputs = aura.example_inputs(settings, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(compute(**inputs)[VELOCITY], aura.transformer(**inputs).sample, rtol=1e-5, atol=1e-5)


def test_its_baseline_and_pictures_are_made_by_the_pipeline_itself(aura):
    prompts = ["a red square", "two green stars"]
    conditions = aura.encode(prompts, SETTINGS, aura.io.conditions)
    noise = aura.example_inputs(SETTINGS)[aura.io.latents].numpy()
    made = aura.generate(conditions, noise, SETTINGS)
    call = {"prompt": prompts, "latents": torch.from_numpy(noise), "height": 32, "width": 48, "num_inference_steps": 3}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 24}
    np.testing.assert_allclose(made, aura.pipeline(**call, output_type="latent").images, atol=1e-5)
    np.testing.assert_allclose(aura.decode(made, SETTINGS), aura.pipeline(**call, output_type="np").images, atol=1e-4)


def test_where_the_last_block_is_not_certain_it_is_asked(aura):
    with pytest.raises(InputError, match=r"several lists of blocks: joint_transformer_blocks \(2 blocks\), .*--cut single_tr"):
        _ = aura.block
    with pytest.raises(InputError, match=r"Linear has no list of blocks .only .*--cut"):
        find_cut(nn.Linear(2, 2))
    block = nn.Sequential(nn.Linear(2, 2))
    model = nn.Module()
    model.body = nn.ModuleList([block, block])
    assert (block_lists(model), find_cut(model)) == ({"body": 2}, "body.1")


def test_what_cannot_be_looked_at_is_refused_in_words():
    with pytest.raises(InputError, match="no family of cachec knows DiTPipeline, and its call takes no prompt, latents"):
        GenericModel.wrap(GenericModel.make_spec("x", "x"), families._dit(), None)
    model = GenericModel.wrap(replace(GenericModel.make_spec("x", "x"), height=32, width=32), families._z_image(), None)
    with pytest.raises(
        InputError, match="ZImagePipeline calls its transformer .* at every guidance scale|as a list of tensors"
    ):
        _ = model.io
