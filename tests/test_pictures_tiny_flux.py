"""tiny-flux as a bundle that needs nothing else: pictures without torch, and the pipeline's own."""

import subprocess
import sys

import numpy as np
import pytest

import cachec
from cachec.compiler.models import MODELS, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise

PROMPTS = ["a laughing face with short blue hair in a red tee on a yellow background", "", "a sad face " * 30]


@pytest.fixture(scope="module")
def loaded(lesa_bundle):
    with cachec.load(lesa_bundle) as loaded:
        yield loaded


def test_noise_levels_of_ones_own_make_pictures(loaded):
    sigmas = [1.0, 0.7, 0.3]
    own = loaded.with_sigmas(sigmas)
    assert own.programs["uncached"].num_steps == 3
    (picture,) = loaded.generate(PROMPTS[:1], sigmas=sigmas)
    np.testing.assert_array_equal(own.generate(PROMPTS[:1])[0], picture)
    encoded = loaded.generator.encode(PROMPTS[:1])
    np.testing.assert_array_equal(loaded.generator.decode(own.denoise(encoded, [0]))[0], picture)
    with pytest.raises(InputError, match="steps is 4, and sigmas are 3"):
        loaded.generate(PROMPTS[:1], sigmas=sigmas, steps=4)


def test_conditions_and_pictures_are_the_pipelines_own(loaded):
    model, settings = load_model(MODELS["tiny-flux"], with_transformer=False), settings_of(loaded.manifest)
    wanted = model.encode(PROMPTS, settings, loaded.io.conditions)
    made = loaded.generator.encode(PROMPTS)
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(made[name], value, atol=2e-5)
    latents = np.stack([make_noise(seed, (64, 64)) for seed in (0, 1)])
    pictures = loaded.generator.decode(latents)
    exact = (model.decode(latents, settings) * 255).round().astype(np.uint8)
    assert np.abs(pictures.astype(int) - exact).max() <= 1
    assert (pictures != exact).mean() < 1e-3


def test_a_request_is_the_denoise_loop_between_both(loaded):
    generator = loaded.generator
    pictures = loaded.generate(PROMPTS[:2], seeds=[7, 8])
    latents = loaded.denoise(generator.encode(PROMPTS[:2]), [7, 8])
    np.testing.assert_array_equal(pictures, generator.decode(latents))
    np.testing.assert_array_equal(loaded.generate(PROMPTS[1:2], seeds=[8])[0], pictures[1])
    assert pictures.shape == (2, 128, 128, 3)
    assert pictures.dtype == np.uint8


def test_another_scale_of_guidance_is_another_picture(loaded):
    usual, other = (loaded.generate(PROMPTS[:1], guidance=scale) for scale in (None, 1.0))
    assert (usual != other).any()


def test_nothing_is_written_where_the_bundle_lies(lesa_bundle):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in lesa_bundle.rglob("*")}

    before = state()
    with cachec.load(lesa_bundle, verify=True) as loaded:
        loaded.generate(PROMPTS[:1])
    assert state() == before


@pytest.mark.parametrize("keep", [[], ["transformer"], ["vae_decoder"]])
def test_parts_that_are_not_kept_are_loaded_for_their_phase(lesa_bundle, loaded, keep):
    with cachec.load(lesa_bundle, keep=keep) as frugal:
        for _ in range(2):
            np.testing.assert_array_equal(frugal.generate(PROMPTS[:1]), loaded.generate(PROMPTS[:1]))
        held = {name for name, part in frugal.generator._parts.items() if part._bound}
        assert held == set(keep) - {"transformer"}
        assert frugal.engines.is_loaded == ("transformer" in keep)


def test_what_a_long_prompt_loses_is_said_once(lesa_bundle, caplog):
    with cachec.load(lesa_bundle) as loaded:
        for _ in range(2):
            loaded.generator.encode([PROMPTS[2]])
    (record,) = [one for one in caplog.records if "is cut at 24 text tokens" in one.message]
    assert "without 'face a sad" in record.message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "at least one text"),
        ({"prompts": ["x"], "seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompts": ["x"], "negative_prompts": ["y"]}, "no negative branch"),
        ({"prompts": ["x"], "level": "best"}, "unknown level"),
    ],
)
def test_what_cannot_be_made_is_refused(loaded, given, message):
    with pytest.raises(InputError, match=message):
        loaded.generate(**given)


def test_an_unknown_component_is_not_kept(lesa_bundle):
    with cachec.load(lesa_bundle, keep=["vae"]) as loaded, pytest.raises(InputError, match="keep names vae"):
        loaded.generate(["x"])


def test_pictures_are_made_where_there_is_no_torch(lesa_bundle, tmp_path):
    absent = ("torch", "transformers", "diffusers", "accelerate", "scipy")
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        f"import cachec, pathlib\nloaded = cachec.load({str(lesa_bundle)!r})\n"
        f"picture = loaded.generate(['a smiling face'])[0]\n"
        f"pathlib.Path({str(tmp_path / 'a.png')!r}).write_bytes(loaded.generator.to_png(picture))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
