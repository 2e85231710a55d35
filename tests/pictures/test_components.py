"""Parts of a bundle, on engines that numpy stands in for."""

import logging

import numpy as np
import pytest

from cachec.pictures import components
from cachec.pictures.components import best_fit
from cachec.pictures.scales import Scales
from cachec.runtime.bundle import Target
from cachec.runtime.components import Component, PictureFacts, TextFacts, request_peaks
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import BundleError, InputError


def target(backend="ort", system="linux"):
    return Target(backend, "1", system, "any", "float32", "any", {})


class Fit:
    def __init__(self, fits, rank=0):
        self.fits, self.rank, self.target, self.reason = fits, rank, "t", "not here"


def test_a_part_runs_on_the_transformers_device_or_says_that_it_does_not(monkeypatch, caplog):
    gpu = DeviceName("cuda")
    monkeypatch.setattr(components, "find_fit", lambda target, where: Fit(where == gpu))
    assert best_fit([target()], gpu, "text_encoder").fits
    assert not caplog.records
    monkeypatch.setattr(components, "find_fit", lambda target, where: Fit(where == HOST))
    with caplog.at_level(logging.WARNING):
        assert best_fit([target()], gpu, "text_encoder").fits
    assert "text_encoder runs on cpu, since nothing of it runs on cuda:0" in caplog.text
    monkeypatch.setattr(components, "find_fit", lambda target, where: Fit(False))
    with pytest.raises(BundleError, match="nothing of text_encoder runs here"):
        best_fit([target()], gpu, "text_encoder")


def test_scales_are_the_setting_that_branches_are_combined_at():
    scales = Scales(3.5, 2.0)
    assert scales.of_branches("guidance") == 3.5
    assert scales.of_branches("true_cfg_scale") == 2.0


class Manifest:
    def __init__(self, pictures, parts):
        self.pictures, self.components = pictures, parts


def facts():
    return PictureFacts(
        {"16": TextFacts(({"file": "f"},), {"text_encoder": "16"})}, {"guidance": 1.0}, "guidance", "vae_decoder"
    )


def part(weights, activations):
    return Component((target(),), {"16": {"weights": weights, "activations": activations}}).to_json()


def test_facts_survive_json_and_name_parts_that_are_there():
    parts = {"text_encoder": part(10, 1), "vae_decoder": part(4, 6)}
    assert PictureFacts.of(Manifest(facts().to_json(), parts)) == facts()
    with pytest.raises(BundleError, match="vae_decoder, which the bundle lacks"):
        PictureFacts.of(Manifest(facts().to_json(), {"text_encoder": part(10, 1)}))
    with pytest.raises(BundleError, match="does not say how pictures are made"):
        PictureFacts.of(Manifest({"texts": {}}, parts))
    with pytest.raises(InputError, match="compile it with --components all"):
        PictureFacts.of(Manifest({}, {}))


def test_the_peak_of_a_request_is_of_all_parts_or_of_its_largest_phase():
    parts = {"text_encoder": part(10, 1), "text_encoder_2": part(20, 2), "vae_decoder": part(4, 6)}
    kept, phases = request_peaks(Manifest(facts().to_json(), parts), weights=100, working=5)
    assert (kept, phases) == (100 + 34 + 5 + 2 + 6, 105)
    assert request_peaks(Manifest(facts().to_json(), parts), weights=3, working=5)[1] == 30 + 2
    reads = Manifest({**facts().to_json(), "encoder": "vae_encoder"}, {**parts, "vae_encoder": part(50, 60)})
    assert request_peaks(reads, weights=100, working=5) == (kept, phases)
    assert request_peaks(reads, weights=100, working=5, picture=True) == (kept + 110, 110)


def test_rows_beyond_the_last_are_the_last_ones_again():
    from cachec.pictures.generator import run_in_batches

    class Session:
        latent_shape = (2, 3)

        def __init__(self):
            self.seen = []

        def run(self, conditions, noise):
            self.seen.append(conditions["c"].tolist())
            return noise + conditions["c"][:, None]

    session = Session()
    made = run_in_batches(session, {"c": np.arange(3.0)}, np.zeros((3, 3)))
    np.testing.assert_array_equal(made[:, 0], [0, 1, 2])
    assert session.seen == [[0, 1], [2, 2]]
