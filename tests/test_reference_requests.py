"""Whole requests of the reference models, prompts to pictures: a bundle's own parts beside the pipeline's own call."""

import numpy as np
import pytest
import torch
from mp4_files import check_mp4
from toy_product import succeed

import cachec
from cachec.compiler.models import find_model
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a laughing face with short blue hair in a red tee on a yellow background , moves left", ""]
SEEDS = [7, 8]
NEGATIVES = ["a dark face", ""]
CALLS = {  # of the bundle, and of the pipeline
    "tiny-flux": ({"sigmas": [1.0, 0.7, 0.3]}, {"sigmas": [1.0, 0.7, 0.3], "guidance_scale": 3.5}),
    "tiny-qwen": ({"negative_prompts": NEGATIVES}, {"negative_prompt": NEGATIVES, "true_cfg_scale": 3.5}),
    "tiny-hunyuan": ({}, {"num_frames": 9, "guidance_scale": 3.5}),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CALLS if name != "tiny-flux"]


def own_pictures(name, noise, given):
    """What a user of diffusers gets for the same noise, in [0, 1]."""
    spec = find_model(name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(spec.source, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": spec.height, "width": spec.width, "max_sequence_length": spec.text_tokens}
    steps = {} if "sigmas" in given else {"num_inference_steps": 3}
    made = pipeline(prompt=PROMPTS, latents=torch.from_numpy(noise), output_type="np", **sizes, **steps, **given)
    return made.frames if spec.frames > 1 else made.images


@pytest.mark.parametrize("name", ["tiny-flux", *SLOW])
def test_pictures_are_the_pipelines_own_but_for_the_last_bits(name, request):
    bundle = request.getfixturevalue("lesa_bundle") if name == "tiny-flux" else request.getfixturevalue("three_steps")(name)
    ours, theirs = CALLS[name]
    with cachec.load(bundle) as loaded:
        made = loaded.generate(PROMPTS, seeds=SEEDS, level=UNCACHED, **ours)
        noise = np.stack([make_noise(seed, loaded.session().latent_shape[1:]) for seed in SEEDS])
    wanted = 255 * own_pictures(name, noise, theirs)
    assert wanted.std() > 20, "there is something to see"
    assert np.abs(made - wanted).max() < 0.51, "nothing but rounding to 256 values"


@pytest.mark.slow
def test_run_writes_a_video_of_the_frames_that_generate_makes(three_steps, tmp_path):
    bundle, file = three_steps("tiny-hunyuan"), tmp_path / "x.mp4"
    said = succeed("run", bundle, "-p", PROMPTS[0], "--seed", SEEDS[0], "-o", file)
    assert "the bundle's own text encoders and decoder" in said
    with cachec.load(bundle) as loaded:
        (video,) = loaded.generate(PROMPTS[:1], seeds=SEEDS[:1])
    check_mp4(file.read_bytes(), video)
