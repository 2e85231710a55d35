"""Several sizes and numbers of steps in one bundle: with one set of engines."""

import itertools

import numpy as np
import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.models.base import settings_of
from cachec.compiler.options import make_settings, read_options
from cachec.compiler.request import make_request
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError
from cachec.runtime.lane_policy import Policy
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

PROMPT = "a red circle"
SIZES, STEPS = ("32x48", "64x48"), (6, 4)
OWN = (3, 5)  # numbers of steps with noise levels of their own


def denoise(flux_model, bundle, level=None, **where):
    with cachec.load(bundle) as loaded:
        settings = settings_of(loaded.at(**where).manifest)
        conditions = flux_model.encode([PROMPT], settings, flux_model.io.conditions)
        return loaded.denoise(conditions, [3], level=level, **where)


def test_one_set_of_engines_is_for_all_sizes(several):
    manifest = Bundle.open(several, verify=True).manifest
    assert (manifest.sizes, manifest.step_counts) == (SIZES, STEPS + OWN)
    assert len(list(several.rglob("weights-*.bin"))) == 1
    assert [target.shape_bucket for target in manifest.targets] == ["32x48+64x48, 8 text tokens"]
    assert len(list(several.rglob("*.onnx"))) == len(manifest.targets[0].engines)
    assert {shape: one["axes"] for shape, one in manifest.shapes.items()} == {
        "32x48, 8 text tokens": {"size_1": 6, "size_2": 14},
        "64x48, 8 text tokens": {"size_1": 12, "size_2": 20},
    }
    of_one = sum(path.stat().st_size for path in several.rglob("weights-*.bin"))
    assert of_one < 1.2 * manifest.facts["memory"]["weights"]


def test_the_uncached_run_equals_the_pipelines_own_at_another_size(several, flux_model):
    with cachec.load(several, size="64x48", steps=4) as loaded:
        settings = settings_of(loaded.manifest)
        assert (settings.width, settings.height, settings.steps) == (64, 48, 4)
        conditions = flux_model.encode([PROMPT], settings, flux_model.io.conditions)
        session = loaded.session(level=UNCACHED)
        noise = make_noise(1, session.latent_shape[1:])[None]
        np.testing.assert_allclose(session.run(conditions, noise), flux_model.generate(conditions, noise, settings), atol=2e-3)


def test_lanes_serve_all_of_them_at_once(several, flux_model):
    with cachec.load(several) as loaded:
        lanes, tickets = Lanes(loaded, sizes=SIZES, policy=Policy("fifo", 8)), {}
        for where in itertools.product(SIZES, STEPS, ("default", UNCACHED)):
            settings = settings_of(loaded.at(*where[:2]).manifest)
            conditions = flux_model.encode([PROMPT], settings, flux_model.io.conditions)
            size, steps, level = where
            tickets[where] = lanes.submit(conditions, seed=3, size=size, steps=steps, level=level)
        with pytest.raises(InputError, match="size is 32x32, but the bundle was compiled for"):
            lanes.submit(conditions, seed=3, size="32x32")
        rows = [tick.rows for tick in iter(lanes.tick, None)]
        assert max(rows) == 4, "all of a size share"
    for (size, steps, level), ticket in tickets.items():
        np.testing.assert_array_equal(ticket.result(0), denoise(flux_model, several, level, size=size, steps=steps))


def test_run_takes_a_size_and_a_number_of_steps(several, tmp_path):
    from PIL import Image

    succeed("run", several, "-p", PROMPT, "-o", tmp_path / "one.png", "--size", "64x48", "--steps", "4")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (64, 48)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--size", "32x32", "compiled for 32x48, 64x48: take one of them"), ("--steps", "7", "compiled for 6, 4, 3, 5: take one")],
)
def test_what_the_bundle_lacks_is_refused_with_what_it_has(several, tmp_path, option, value, said):
    code, output = run_cli("run", several, "-p", PROMPT, "-o", tmp_path / "one.png", option, value)
    assert code == InputError.exit_code
    assert said in output


def test_inspect_lists_them(several):
    output = succeed("inspect", several)
    assert "32x48, 64x48" in output
    assert "one set for all sizes: size_1 6, 12, size_2 14, 20" in output
    assert output.count("computes 3 of 6 steps") == output.count("computes 3 of 4 steps") == 2


def test_engines_are_loaded_once_for_all_sizes(several, monkeypatch):
    from cachec.engines.ort import OrtEngine

    loads = []
    real = OrtEngine.load.__func__
    monkeypatch.setattr(OrtEngine, "load", classmethod(lambda cls, files, *rest: loads.append(1) or real(cls, files, *rest)))
    with cachec.load(several) as loaded:
        assert len(loads) == 1
        wide = loaded.at("64x48")
        assert loaded.at("64x48", 4).engines is wide.engines
        assert len(loads) == 1
        assert wide.at("32x48", 6).engines is loaded.engines


def test_noise_levels_of_ones_own_are_what_the_pipeline_makes_of_them(flux_model):
    given = (1.0, 0.7, 0.4, 0.2)
    settings = make_settings(flux_model.spec, read_options({"sigmas": given, "size": "64x48", "text_tokens": 8}).model)
    found = flux_model.sampling(settings)
    assert (settings.steps, found.num_steps) == (4, 4)
    shifted = np.exp(_mu(flux_model, settings)) / (np.exp(_mu(flux_model, settings)) + 1 / np.array(given) - 1)
    np.testing.assert_allclose(found.sigmas, [*shifted, 0], rtol=1e-5)
    assert settings.with_steps(4) is settings
    assert settings.with_steps(6).sigmas is None


def _mu(flux_model, settings):
    """FLUX's shift at its number of tokens."""
    config, tokens = flux_model.pipeline.scheduler.config, settings.height * settings.width // 256
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigmas": "1,0.5", "steps": 3}, "1,0.5. are 2 noise levels for 3 steps"),
        ({"sigmas": "1,0.5,0.5"}, "must fall and stay above 0"),
        ({"sigmas": "1,0.5,0"}, "must fall and stay above 0"),
        (
            {"sigmas": "1,0.5,0.2", "method": "gram", "schedule": "search", "reference_steps": 12},
            "do not meet those of --sigmas",
        ),
    ],
)
def test_noise_levels_that_cannot_be_are_refused(flux_model, given, said):
    with pytest.raises(InputError, match=said):
        make_request(flux_model.spec, **{"method": "taylor", "budget": 2, **given})
