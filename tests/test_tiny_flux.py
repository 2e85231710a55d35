"""The main job on the reference model that ships, as any FLUX pipeline, with the predictor that ships. More is on the toy."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from toy_product import succeed

import cachec
from cachec.compiler.methods.parameters import PRETRAINED, load_predictor
from cachec.compiler.models import MODELS, TINY_FLUX_DIR, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.bundle import Bundle
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

PROMPT = "a laughing face with short blue hair in a red tee on a yellow background"


@pytest.fixture(scope="session")
def model():
    return load_model(MODELS["tiny-flux"])


@pytest.fixture(scope="session")
def conditions(model, lesa_bundle):
    return model.encode([PROMPT], settings_of(Bundle.open(lesa_bundle).manifest), model.io.conditions)


def test_the_reference_model_loads_as_any_flux_pipeline_does():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, height=128, width=128, max_sequence_length=24, num_inference_steps=4).images[0]
    assert picture.size == (128, 128)


def test_the_reference_model_is_small_enough_to_ship():
    model = sum(file.stat().st_size for file in TINY_FLUX_DIR.rglob("*") if file.is_file())
    assert model <= 25e6
    assert model + sum(file.stat().st_size for file in PRETRAINED.glob("*")) <= 40e6


def test_the_shipped_predictor_tells_how_it_was_trained():
    facts = load_predictor(next(PRETRAINED.glob("lesa-tiny-flux-*.safetensors"))).facts
    curve = json.loads(facts["curve"])
    assert curve[-1]["updates"] > 1000
    assert min(point["held_out_latent_rel_l2"] for point in curve) < curve[0]["held_out_latent_rel_l2"]
    assert {"seed", "num_prompts", "prompts_sha256", "weights_sha256", "steps", "interval"} <= set(facts)


@pytest.mark.smoke
def test_bundle_computes_the_ten_published_steps(lesa_bundle):
    assert "ToonHead" in Bundle.open(lesa_bundle).manifest.model["credit"]  # as its licence asks
    program = Bundle.open(lesa_bundle).program()
    assert program.compute_steps == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
    assert program.num_steps == 50


@pytest.mark.smoke
def test_run_writes_a_picture(lesa_bundle, tmp_path):
    out = tmp_path / "one.png"
    succeed("run", lesa_bundle, "-p", PROMPT, "-o", out)
    with Image.open(out) as picture:
        assert picture.size == (128, 128)
        assert np.asarray(picture).std() > 5


def test_uncached_program_equals_the_diffusers_pipeline(lesa_bundle, model, conditions):
    settings = settings_of(Bundle.open(lesa_bundle).manifest)
    with cachec.load(lesa_bundle) as loaded:
        session = loaded.session(level=UNCACHED)
        noise = make_noise(1, session.latent_shape[1:])[None]
        uncached = session.run(conditions, noise)
        np.testing.assert_allclose(uncached, model.generate(conditions, noise, settings), atol=2e-3)
        forecast = loaded.session().run(conditions, noise)
    assert 0 < np.linalg.norm(forecast - uncached) < 0.2 * np.linalg.norm(uncached)


@pytest.mark.smoke
def test_denoising_on_onnx_runtime_loads_neither_torch_nor_diffusers_nor_onnx(lesa_bundle, conditions, tmp_path):
    np.savez(tmp_path / "conditions.npz", **conditions)
    code = """
import sys
import numpy as np
import cachec
with cachec.load(sys.argv[1]) as loaded:
    latents = loaded.denoise(dict(np.load(sys.argv[2])), [3])
assert np.isfinite(latents).all()
loaded = {"torch", "diffusers", "transformers", "onnx", "onnxscript"} & set(sys.modules)
assert not loaded, loaded
"""
    arguments = [sys.executable, "-c", code, lesa_bundle, tmp_path / "conditions.npz"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
