"""Tiny-qwen and tiny-hunyuan: one update each, and their networks called as their pipelines call them."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from reference.avatars import muon, qwen_autoencoder, tiny_hunyuan, tiny_qwen
from reference.avatars.flow import Plan, Trainer, sample

CAPTIONS = ["a sad face in a red tee with no hair", "a happy face"]


class Source:
    def __init__(self, shape):
        self.shape = shape

    def batch(self, num):
        return torch.randn(num, *self.shape), CAPTIONS[:num]


@pytest.fixture(scope="module")
def learners():
    return {
        "qwen": (tiny_qwen.QwenLearner(), (64, 64)),
        "hunyuan": (tiny_hunyuan.HunyuanLearner(), tiny_hunyuan.LATENT_SHAPE),
    }


@pytest.mark.parametrize("name", ["qwen", "hunyuan"])
def test_an_update(learners, name, tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "orthogonal", torch.sign)  # the costly part, which has tests of its own
    learner, shape = learners[name]
    trainer = Trainer(learner, Source(shape), Plan("small", tmp_path, 10, 2))
    before = trainer.network.proj_out.weight.clone()
    assert np.isfinite(trainer.update(0))
    assert not torch.equal(trainer.network.proj_out.weight, before)
    assert sum(p.numel() for p in trainer.network.parameters()) * 2 < 25e6  # bytes of float16


def moving(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.slow
def test_qwen_samples_as_its_pipeline_draws(learners):
    learner, shape = learners["qwen"]
    torch.manual_seed(0)
    network, noise = moving(learner.build()), torch.randn(1, *shape)
    pipeline = learner.pipeline
    pipeline.register_modules(
        transformer=network,
        vae=qwen_autoencoder.build_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.15, max_shift=1.15),
    )
    drawn = pipeline(
        CAPTIONS[0], " ", true_cfg_scale=1.0, num_inference_steps=3, height=128, width=128, latents=noise, output_type="latent"
    )
    found = sample(learner, network, noise, CAPTIONS[:1], scale=1.0, steps=3, shift=1.15)
    torch.testing.assert_close(found, drawn.images, rtol=1e-4, atol=1e-4)
