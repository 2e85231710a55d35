"""Pipelines put together from networks that have learnt nothing: they load and draw."""

import pytest
import torch
from diffusers import DiffusionPipeline

from reference.avatars import autoencoder, qwen_autoencoder, score, tiny_flux, tiny_hunyuan, tiny_qwen, video_autoencoder
from reference.avatars.assemble import assemble

LEARNERS = {"tiny-flux": tiny_flux.FluxLearner, "tiny-qwen": tiny_qwen.QwenLearner, "tiny-hunyuan": tiny_hunyuan.HunyuanLearner}


@pytest.mark.parametrize("name", ["tiny-flux", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LEARNERS)[1:])])
def test_a_pipeline_is_written_loaded_and_draws(name, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "STEPS", 1)
    network = LEARNERS[name]().build()
    torch.save({"average": network.state_dict()}, tmp_path / f"{name}.pt")
    vae = autoencoder.build_autoencoder()
    vae.register_to_config(shift_factor=0.0)
    vae.save_pretrained(tmp_path / "vae")
    qwen_autoencoder.build_autoencoder().save_pretrained(tmp_path / "vae-qwen")
    video_autoencoder.build_autoencoder().save_pretrained(tmp_path / "vae-video")
    to = assemble(name, tmp_path)
    assert sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) < 25e6
    pipeline = DiffusionPipeline.from_pretrained(to, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = score.DRAWINGS[name].draw(pipeline, ["a sad face in a red tee with no hair"], torch.Generator().manual_seed(0))
    assert drawn.shape == ((1, 9, 96, 96, 3) if name == "tiny-hunyuan" else (1, 128, 128, 3))
