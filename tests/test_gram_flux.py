"""tiny-flux compiled with fitted rows: calibration file, levels, gate; 8 steps, so that it is quick."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cachec
from cachec.cli import main
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.statistics import load_statistics
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError, QualityError
from cachec.runtime.noise import make_noise
from cachec.runtime.write import BundleWriter

STEPS, FINE, NUM = 8, 16, 8


@pytest.fixture(scope="module")
def model():
    return load_model(find_model("tiny-flux"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    result = CliRunner().invoke(
        main, ["calibrate", "tiny-flux", "-o", str(path), f"--num={NUM}", f"--steps={STEPS}", f"--reference-steps={FINE}"]
    )
    assert result.exit_code == 0, result.output
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # the batches are gone
    return path


@pytest.fixture(scope="module")
def levels(tmp_path_factory, model, calibration):
    out = tmp_path_factory.mktemp("bundles") / "levels.cachec"
    request = make_request(
        model.spec, method="gram", options={"polish": "0"}, steps=STEPS, levels="fine,high,fast=25", calibration=calibration
    )
    compile_bundle(model, request, out)
    return out


def test_a_calibration_file_says_what_it_is_of(model, calibration):
    statistics = load_statistics(calibration)
    assert statistics.prompts == tuple(default_prompts("shapes", "train")[:NUM])
    assert statistics.facts["weights_sha256"] == model.weights_hash
    assert statistics.velocity_gram.shape == (NUM, STEPS, STEPS)
    assert statistics.velocity_gram.dtype == torch.float64
    assert statistics.fine_latents.shape[:2] == (NUM, FINE)


def test_levels_hold_what_they_promise(levels):
    manifest = Bundle.open(levels).manifest
    facts = manifest.facts["levels"]
    assert list(manifest.programs) == ["uncached", "fine", "high", "fast"]
    assert facts["high"]["psnr_db"] >= 45 - 0.05
    assert facts["fast"]["psnr_db"] >= 25 - 0.05
    assert facts["fast"]["computed"] <= facts["high"]["computed"]
    assert facts["fine"]["grid"] == FINE
    assert {level["num_prompts"] for level in facts.values()} == {NUM // 4}
    assert "forecast" not in manifest.targets[0].engines  # the output cut forecasts nothing


def test_fine_is_as_close_to_the_fine_run_as_the_uncached_run(levels, model, calibration):
    statistics, manifest = load_statistics(calibration), Bundle.open(levels).manifest
    settings = settings_of(manifest)
    index = torch.arange(NUM) % 4 == 3

    def psnr(a, b):
        pictures = [model.decode(x[index, -1].numpy(), settings) for x in (a, b)]
        return np.mean([-10 * np.log10(np.mean((p - q) ** 2)) for p, q in zip(*pictures, strict=True)])

    uncached = psnr(statistics.latents, statistics.fine_latents)
    assert manifest.facts["levels"]["fine"]["psnr_db_fine"] >= uncached - 0.05


def test_every_level_runs_and_they_differ(levels, model):
    with cachec.load(levels) as bundle:
        conditions = model.encode(["a red circle"], settings_of(bundle.manifest), bundle.io.conditions)
        found = {level: bundle.denoise(conditions, [3], level=level) for level in bundle.programs}
        noise = make_noise(3, bundle.session().latent_shape[1:])[None]
        again = bundle.session(level="fast").run(conditions, noise)
    np.testing.assert_array_equal(found["fast"], again)
    reference = found.pop("uncached")
    errors = {level: np.linalg.norm(x - reference) / np.linalg.norm(reference) for level, x in found.items()}
    assert 0 < errors["high"] < errors["fast"] < 1
    assert 0 < errors["fine"] < 1


def test_a_failed_gate_leaves_nothing_and_levels_change_no_engine(levels, model, calibration, tmp_path, monkeypatch):
    sealed, seal = {}, BundleWriter.seal

    def watched(self, path):
        name = seal(self, path)
        sealed[name] = self.files[name]["sha256"]
        return name

    monkeypatch.setattr(BundleWriter, "seal", watched)
    request = make_request(
        model.spec, method="gram", options={"polish": "0"}, steps=STEPS, budget=3, calibration=calibration, min_psnr=200.0
    )
    with pytest.raises(QualityError, match=r"level default reaches \d+\.\d+ dB on 2 held-out prompts, \d+\.\d+ dB below"):
        compile_bundle(model, request, tmp_path / "gated.cachec")
    assert list(tmp_path.iterdir()) == []
    engines = {n: f["sha256"] for n, f in Bundle.open(levels).manifest.files.items() if n.startswith("engines/")}
    assert engines
    assert engines == {name: digest for name, digest in sealed.items() if name.startswith("engines/")}


def test_a_calibration_of_other_settings_is_refused_before_any_work(model, calibration, tmp_path):
    request = make_request(model.spec, method="gram", steps=10, budget=3, calibration=calibration, height=32)
    with pytest.raises(InputError, match=r"steps is 8, wanted 10.*height is 64, wanted 32.*cachec calibrate"):
        compile_bundle(model, request, tmp_path / "x.cachec")
    request = make_request(model.spec, method="gram", steps=STEPS, budget=3, calibration=calibration, reference_steps=32)
    with pytest.raises(InputError, match="reference_steps is 16, wanted 32"):
        compile_bundle(model, request, tmp_path / "x.cachec")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_target_removes_the_calibration_that_it_made(model, tmp_path):
    prompts = tmp_path.parent / "eight.txt"
    prompts.write_text("\n".join(default_prompts("shapes", "train")[:8]))
    options = {"polish": "0"}
    request = make_request(model.spec, method="gram", options=options, steps=2, budget=1, min_psnr=200.0, prompts=prompts)
    with pytest.raises(QualityError, match="below --min-psnr 200"):
        compile_bundle(model, request, tmp_path / "gated.cachec")
    assert list(tmp_path.iterdir()) == []


def test_run_takes_a_level(levels, tmp_path):
    out = tmp_path / "a.png"
    result = CliRunner().invoke(main, ["run", str(levels), "-p", "a red circle", "--level", "fast", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 0
    result = CliRunner().invoke(main, ["run", str(levels), "-p", "x", "--level", "fats", "-o", str(tmp_path / "b.png")])
    assert result.exit_code == 3
    assert "Did you mean 'fast'" in result.output


def test_inspect_lists_levels_with_their_figures(levels):
    result = CliRunner().invoke(main, ["inspect", str(levels)])
    assert "level fast" in result.output
    assert "held-out prompts when compiled" in result.output
    data = json.loads(CliRunner().invoke(main, ["inspect", str(levels), "--json"]).output)
    assert data["programs"]["fast"]["cut"] == "output"
