"""tiny-flux begins with pictures: the pipeline's own image to image, from a bundle alone."""

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.models import MODELS, load_model
from cachec.pictures.beginning import Beginning
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise

PROMPTS = ["a laughing face with short blue hair in a red tee on a yellow background", "a sad face"]
START, STRENGTH = 40, 0.2


@pytest.fixture(scope="module")
def loaded(lesa_bundle):
    with cachec.load(lesa_bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pictures(loaded):
    return loaded.generate(["an angry person with no hair", "a sleepy face"], seeds=[3, 4])


def test_with_every_step_computed_it_is_the_pipelines_own(loaded, pictures):
    model = load_model(MODELS["tiny-flux"])
    vae, transformer = model.encoder, model.transformer  # which the pipeline has from here on
    twin = FluxImg2ImgPipeline(**model.pipeline.components)
    twin.set_progress_bar_config(disable=True)
    assert twin.transformer is transformer
    given = torch.from_numpy(pictures[:1]).float().permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = (vae.encode(given).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    conditions = loaded.generator.encode(PROMPTS[:1])
    embeds = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    wanted = twin(
        image=latents,  # the likeliest, of which the pipeline takes what it would else draw
        strength=STRENGTH, num_inference_steps=50, guidance_scale=3.5, height=128, width=128, output_type="latent",
        generator=torch.Generator().manual_seed(7), **{name: torch.from_numpy(conditions[key]) for name, key in embeds.items()},
    ).images  # fmt: skip
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    begin = Beginning(START, loaded.generator.encode_pictures(pictures[:1]))
    session = loaded.session(level="uncached", start=START)
    mixed = begin.mixed(twin._pack_latents(noise, *noise.shape).numpy(), session.program.sigmas)
    np.testing.assert_allclose(session.run(conditions, mixed), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("level", ["uncached", None])
def test_a_request_is_the_session_from_its_step_on(loaded, pictures, level):
    generator = loaded.generator
    made = loaded.generate(PROMPTS, seeds=[7, 8], pictures=pictures, strength=STRENGTH, level=level)
    session = loaded.session(batch=2, level=level, start=START)
    noise = np.stack([make_noise(seed, session.latent_shape[1:]) for seed in (7, 8)])
    begin = Beginning(START, generator.encode_pictures(pictures))
    latents = session.run(generator.encode(PROMPTS), begin.mixed(noise, session.program.sigmas))
    np.testing.assert_array_equal(made, generator.decode(latents))
    assert 0 < np.abs(made.astype(int) - pictures).mean() < np.abs(loaded.generate(PROMPTS).astype(int) - pictures).mean()


def test_little_strength_leaves_a_picture_and_all_of_it_forgets_it(loaded, pictures):
    near = loaded.generate(PROMPTS[:1], pictures=pictures[:1], strength=0.02, level="uncached")
    assert np.abs(near.astype(int) - pictures[:1]).mean() < 8
    whole = loaded.generate(PROMPTS[:1], pictures=pictures[:1], strength=1.0)
    np.testing.assert_array_equal(whole, loaded.generate(PROMPTS[:1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.5}, "give pictures, too"),
        ({"pictures": np.zeros((1, 32, 32, 3), np.uint8)}, "of 128x128 they are"),
        ({"pictures": np.zeros((2, 128, 128, 3), np.uint8)}, "2 pictures for 1 prompts"),
        ({"pictures": np.zeros((1, 128, 128, 3), np.uint8), "strength": 0.0}, "strength is 0;"),
    ],
)
def test_what_cannot_begin_is_refused(loaded, given, message):
    with pytest.raises(InputError, match=message):
        loaded.generate(["x"], **given)


def test_a_bundle_without_an_encoder_says_so(loaded, pictures, monkeypatch):
    from dataclasses import replace

    generator = loaded.generator
    monkeypatch.setattr(generator, "_facts", replace(generator._facts, encoder=None))
    assert not generator.takes_pictures
    with pytest.raises(InputError, match="takes no pictures, as it has no encoder"):
        loaded.generate(["x"], pictures=pictures[:1])


def test_the_command_takes_a_file(loaded, lesa_bundle, pictures, tmp_path):
    (tmp_path / "in.png").write_bytes(loaded.generator.to_png(pictures[0]))
    given = ("-p", PROMPTS[0], "--seed", "7", "--picture", tmp_path / "in.png")
    succeed("run", lesa_bundle, *given, "--strength", STRENGTH, "-o", tmp_path / "out.png")
    wanted = loaded.generate(PROMPTS[:1], seeds=[7], pictures=pictures[:1], strength=STRENGTH)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), wanted[0])
    (tmp_path / "wide.png").write_bytes(loaded.generator.to_png(pictures[0][:64]))
    code, told = run_cli("run", lesa_bundle, "-p", "x", "--picture", tmp_path / "wide.png", "-o", tmp_path / "b.png")
    assert (code, "the picture is 128x64, and wanted is 128x128" in told) == (InputError.exit_code, True)
