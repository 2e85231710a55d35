"""The toy compiled with fitted rows through the command line: calibration file, levels, gate."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import cachec
from cachec.cli import main
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.statistics import load_statistics
from cachec.compiler.calibration.uses import NUM_CHOOSE, NUM_FIT, NUM_MEASURE, NUM_PICTURED
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError, QualityError

STEPS, FINE, NUM = 8, 16, 8
DRAFT = {"polish": "0"}
EAGER = {"steps": STEPS, "targets": "eager"}


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def model(toy_directory):
    return load_model(find_model(str(toy_directory)))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, toy_directory):
    path = tmp_path_factory.mktemp("calibration") / "toy.safetensors"
    result = run("calibrate", toy_directory, "-o", path, f"--num={NUM}", f"--steps={STEPS}", f"--reference-steps={FINE}")
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def levels(tmp_path_factory, model, calibration):
    out = tmp_path_factory.mktemp("bundles") / "levels.cachec"
    request = make_request(
        model.spec, **EAGER, method="gram", options=DRAFT, levels="fine,high,fast=25", calibration=calibration
    )
    compile_bundle(model, request, out)
    return out


def test_a_calibration_file_says_what_it_is_of_and_what_its_prompts_are_for(model, calibration):
    statistics = load_statistics(calibration)
    assert statistics.prompts.only("fit", "stop").prompts == tuple(default_prompts("avatars", "train")[:NUM])
    assert statistics.prompts.only("measure").prompts == tuple(default_prompts("avatars", "measure")[:NUM_MEASURE])
    assert statistics.facts["weights_sha256"] == model.weights_hash
    assert statistics.fine_latents.shape[:2] == (NUM + NUM_MEASURE, FINE)


def test_levels_are_measured_on_prompts_of_their_own(levels):
    manifest = Bundle.open(levels).manifest
    facts = manifest.facts["levels"]
    assert list(manifest.programs) == ["uncached", "fine", "high", "fast"]
    assert facts["fast"]["computed"] <= facts["high"]["computed"]
    assert facts["fast"]["psnr_db"] < facts["high"]["psnr_db"]
    assert facts["fine"]["grid"] == FINE
    assert {level["num_prompts"] for level in facts.values()} == {NUM_MEASURE}
    assert "forecast" not in manifest.targets[0].engines  # the output cut forecasts nothing


def test_every_level_runs_as_it_was_measured(levels, model, calibration):
    statistics = load_statistics(calibration)
    place = statistics.prompts.places("measure")
    with cachec.load(levels) as bundle:
        settings = settings_of(bundle.manifest)
        conditions = model.encode([statistics.prompts.prompts[i] for i in place], settings, bundle.io.conditions)
        for level, known in bundle.manifest.facts["levels"].items():
            session = bundle.session(batch=len(place), level=level)
            latents, wanted = session.run(conditions, statistics.noise[place]), statistics.latents[place, -1]
            errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(latents, wanted, strict=True)]
            assert known["latent_error"] == pytest.approx(np.mean(errors), rel=1e-2)


def test_a_failed_gate_leaves_nothing_and_levels_change_no_engine(levels, model, calibration, tmp_path):
    request = make_request(model.spec, **EAGER, method="gram", options=DRAFT, budget=2, calibration=calibration, min_psnr=200.0)
    with pytest.raises(QualityError, match=r"level default reaches \d+\.\d+ dB on 16 held-out prompts, \d+\.\d+ dB below"):
        compile_bundle(model, request, tmp_path / "gated.cachec")
    assert list(tmp_path.iterdir()) == []
    engines = {n for n in Bundle.open(levels).manifest.files if n.startswith("engines/")}
    request = make_request(model.spec, **EAGER, method="adams", budget=3, min_psnr=1.0)
    bundle = compile_bundle(model, request, tmp_path / "adams.cachec").bundle
    assert {n for n in bundle.manifest.files if n.startswith("engines/")} == engines  # files are named by their hash
    facts = bundle.manifest.facts  # nothing is fitted, so only the prompts to measure on were run
    assert facts["calibration"]["num_prompts"] == str(NUM_MEASURE)
    assert facts["levels"]["default"]["num_prompts"] == NUM_MEASURE


def test_a_calibration_of_other_settings_is_refused_before_any_work(model, calibration, tmp_path):
    request = make_request(model.spec, method="gram", steps=10, budget=3, calibration=calibration)
    with pytest.raises(InputError, match=r"steps is 8, wanted 10.*cachec calibrate"):
        compile_bundle(model, request, tmp_path / "x.cachec")
    request = make_request(model.spec, method="gram", steps=STEPS, budget=3, calibration=calibration, reference_steps=32)
    with pytest.raises(InputError, match="reference_steps is 16, wanted 32"):
        compile_bundle(model, request, tmp_path / "x.cachec")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_budgets_schedule_is_chosen_by_pictures_of_prompts_that_are_there_for_it(model, tmp_path, caplog):
    request = make_request(model.spec, **EAGER, method="gram", options={**DRAFT, "choose": "pictures"}, budget=3)
    with caplog.at_level("WARNING"):
        bundle = compile_bundle(model, request, tmp_path / "chosen.cachec").bundle
    assert f"gram is fitted to {NUM_FIT} prompts, its schedule chosen by pictures of {NUM_CHOOSE} others" in caplog.messages
    assert bundle.manifest.facts["calibration"]["num_prompts"] == str(NUM_PICTURED + NUM_MEASURE + NUM_CHOOSE)
    assert len(bundle.program("default").compute_steps) == 3


def test_the_command_line_takes_a_level_and_shows_its_figures(levels, tmp_path):
    out = tmp_path / "a.png"
    result = run("run", levels, "-p", "a red circle", "--level", "fast", "-o", out)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 0
    result = run("run", levels, "-p", "x", "--level", "fats", "-o", tmp_path / "b.png")
    assert result.exit_code == 3
    assert "Did you mean 'fast'" in result.output
    result = run("inspect", levels)
    assert "level fast" in result.output
    assert "16 held-out prompts, by" in result.output
    assert json.loads(run("inspect", levels, "--json").output)["programs"]["fast"]["cut"] == "output"
