"""Noise levels of one's own: several lists in one bundle, and others at run time, as the pipeline's own loop takes them."""

from dataclasses import replace

import numpy as np
import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.models.base import settings_of
from cachec.runtime.errors import InputError
from cachec.runtime.lanes import Lanes
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

PROMPT = "a red circle"
COMPILED = (1.0, 0.6, 0.3)
OTHERS = (1.0, 0.85, 0.5, 0.2)


@pytest.fixture(scope="module")
def bundle(several):
    with cachec.load(several) as loaded:
        yield loaded


def wanted(flux_model, bundle, sigmas, size=None):
    """Conditions, noise, and the latents of the pipeline's own loop."""
    settings = replace(settings_of(bundle.at(size).manifest), steps=len(sigmas), sigmas=sigmas)
    conditions = flux_model.encode([PROMPT], settings, flux_model.io.conditions)
    noise = make_noise(3, bundle.at(size).session().latent_shape[1:])[None]
    return conditions, noise, flux_model.generate(conditions, noise, settings)


def test_a_bundle_has_a_list_for_each_number_of_steps(flux_model, bundle):
    assert bundle.bundle.manifest.step_counts == (6, 4, 3, 5)
    assert bundle.manifest.settings["sigmas"] is None
    for steps in (3, 5):
        there = bundle.at(steps=steps)
        settings = settings_of(there.manifest)
        assert len(settings.sigmas) == steps
        np.testing.assert_array_equal(there.programs[UNCACHED].sigmas, flux_model.sampling(settings).sigmas)


@pytest.mark.parametrize("size", ["32x48", "64x48"])
def test_others_are_computed_as_by_the_pipeline(flux_model, bundle, caplog, size):
    conditions, noise, latents = wanted(flux_model, bundle, OTHERS, size)
    caplog.clear()
    with caplog.at_level("WARNING", "cachec"):
        own = bundle.at(size).with_sigmas(OTHERS)
        got = own.session().run(conditions, noise)
        np.testing.assert_array_equal(own.denoise(conditions, [3]), got)
    np.testing.assert_allclose(got, latents, atol=1e-5 * np.abs(latents).max())
    (warning,) = caplog.messages
    assert "every step is computed. To save time, compile with --sigmas 1,0.85,0.5,0.2" in warning
    later = own.session(start=2).run(conditions, noise)
    assert np.isfinite(later).all()
    assert not np.array_equal(later, got)


def test_those_that_the_bundle_has_are_played_by_its_programs(bundle, caplog):
    with caplog.at_level("WARNING", "cachec"):
        own = bundle.with_sigmas(COMPILED)
    assert own.programs is bundle.at(steps=3).programs
    assert own.manifest.settings["steps"] == 3
    assert not caplog.messages


def test_lanes_take_them_beside_the_bundles_own(flux_model, bundle):
    conditions, noise, latents = wanted(flux_model, bundle, OTHERS)
    own = bundle.with_sigmas(OTHERS)
    lanes = Lanes(own, lanes=2, buckets=(1,))
    tickets = [lanes.submit(conditions, noise=noise, steps=steps) for steps in (None, 3)]
    lanes.run_until_idle()
    np.testing.assert_allclose(tickets[0].result(), latents, atol=1e-5 * np.abs(latents).max())
    np.testing.assert_array_equal(tickets[1].result(), bundle.at(steps=3).denoise(conditions, [3]))
    assert own.at(steps=3).programs is bundle.at(steps=3).programs


def test_another_size_has_levels_of_its_own(bundle):
    own = bundle.with_sigmas(OTHERS)
    there = own.at("64x48")
    assert own.at(text=8).programs[UNCACHED].digest() == own.programs[UNCACHED].digest()
    assert there.manifest.settings["sigmas"] == list(OTHERS)
    np.testing.assert_array_equal(
        there.programs[UNCACHED].sigmas, bundle.at("64x48").with_sigmas(OTHERS).programs[UNCACHED].sigmas
    )


def test_the_command_line_takes_them(several, tmp_path, caplog):
    succeed("run", several, "-p", PROMPT, "--sigmas", "1,0.5", "-o", tmp_path / "a.png")
    assert "every step is computed" in caplog.text
    assert (tmp_path / "a.png").is_file()
    for given, said in (("1,x", "must be numbers with commas"), ("0.5,1", "must fall")):
        assert said in run_cli("run", several, "-p", PROMPT, "--sigmas", given, "-o", tmp_path / "b.png")[1]
    both = run_cli("run", several, "-p", PROMPT, "--sigmas", "1,0.5", "--steps", "3", "-o", tmp_path / "b.png")
    assert "contradict each other" in both[1]


def test_what_cannot_be_is_refused(bundle):
    for sigmas, said in (((), "none"), ((0.5, 0.5), "must fall"), ((1.0, 0.0), "stay above 0")):
        with pytest.raises(InputError, match=said):
            bundle.with_sigmas(sigmas)
    handed = {name: value for name, value in bundle.manifest.facts["handed"].items() if name != "own_sigmas"}
    unknown = replace(bundle, origin=None, manifest=replace(bundle.manifest, facts={"handed": handed}))
    with pytest.raises(InputError, match="says nothing of it what its sampler makes of sigmas, and 2 are given: compile with"):
        unknown.with_sigmas((1.0, 0.5))
    handed["own_sigmas"] = {**bundle.manifest.facts["handed"]["own_sigmas"], "steps": 6}
    with pytest.raises(InputError, match="says for 6 steps only what"):
        replace(unknown, manifest=replace(bundle.manifest, facts={"handed": handed})).with_sigmas((1.0, 0.5))
    few = replace(bundle, target=replace(bundle.target, sizes={"compute_steps": (1, 3, 6)}))
    with pytest.raises(InputError, match="sigmas are 7, and the engines of .* are for up to 6 steps"):
        few.with_sigmas(np.linspace(1, 0.1, 7))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigmas": "1,0.5;1,0.4"}, "sigmas are 2 lists of 2, 2 noise levels, and a bundle has one for each number of steps"),
        ({"sigmas": "1,0.5;1,0.4,0.2", "steps": "2,4"}, "1,0.4,0.2. are 3 noise levels for 2 steps"),
    ],
)
def test_lists_that_cannot_be_are_refused(flux_model, given, said):
    from cachec.compiler.request import make_request

    with pytest.raises(InputError, match=said):
        make_request(flux_model.spec, method="taylor", **given)
