"""tiny-flux as a bundle that needs nothing else: pictures without torch, and the pipeline's own."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from toy_product import succeed

import cachec
from cachec.compiler.models import MODELS, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from tests.hub_stand_in import asking, hub_on_loopback

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


def test_inspect_says_what_a_whole_request_takes(lesa_bundle):
    said = " ".join(succeed("inspect", lesa_bundle).split())
    where = r"([\d.]+) MB where all components are kept, ([\d.]+) MB where each is there for its phase"
    kept, phase = map(float, re.search(f"request from a prompt to its picture at most {where}", said).groups())
    size = sum(path.stat().st_size for path in lesa_bundle.rglob("*")) / 1e6
    assert phase < kept
    assert size / 2 < kept < 10 * size


@pytest.fixture
def read_only(lesa_bundle, tmp_path):
    """The bundle where nobody may write, but root."""
    copy = tmp_path / "read-only"
    shutil.copytree(lesa_bundle, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield copy
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755)


def test_a_bundle_in_a_read_only_directory_makes_pictures(read_only, loaded, tmp_path):
    """Root is kept from writing by leaving that capability out."""
    without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if without and shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and there is no setpriv to keep it from that")
    code = (
        f"import cachec, pathlib\n"
        f"try: pathlib.Path({str(read_only)!r}, 'x').touch()\nexcept PermissionError: print('cannot be written')\n"
        f"picture = cachec.load({str(read_only)!r}, verify=True).generate([{PROMPTS[0]!r}])\n"
        f"pathlib.Path({str(tmp_path / 'picture')!r}).write_bytes(picture.tobytes())\n"
    )
    result = subprocess.run([*without, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "cannot be written\n"), result.stderr
    assert (tmp_path / "picture").read_bytes() == loaded.generate(PROMPTS[:1]).tobytes()


def test_a_bundle_is_opened_by_its_name_on_the_hub(lesa_bundle, loaded, tmp_path):
    code = (
        f"import cachec, pathlib\nfrom cachec.cli import main\n"
        f"picture = cachec.load('somebody/tiny').generate([{PROMPTS[0]!r}])\n"
        f"pathlib.Path('picture').write_bytes(picture.tobytes())\n"
        f"main(['run', 'somebody/tiny', '-p', {PROMPTS[0]!r}, '-o', 'x.png'])\n"
    )
    with hub_on_loopback() as (hub, address):
        files = [path for path in lesa_bundle.rglob("*") if path.is_file()]
        hub.files["somebody/tiny"] = {path.relative_to(lesa_bundle).as_posix(): path.read_bytes() for path in files}
        given = {"env": asking(address, tmp_path / "hf"), "cwd": tmp_path}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **given)
    assert result.returncode == 0, result.stderr
    (wanted,) = loaded.generate(PROMPTS[:1])
    assert (tmp_path / "picture").read_bytes() == wanted.tobytes()
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), wanted)
