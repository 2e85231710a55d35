"""Fitted rows on the toy, from the command line: calibration file, levels, gate."""

import json

import numpy as np
import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.calibration.statistics import load_statistics
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError, QualityError
from cachec.runtime.noise import make_noise

STEPS, FINE, NUM = 8, 16, 12
GRAM = ["--method", "gram", "--set", "polish=0", "--steps", STEPS, "--target", "eager"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, toy_directory):
    path = tmp_path_factory.mktemp("calibration") / "toy.safetensors"
    succeed("calibrate", toy_directory, "-o", path, "--num", NUM, "--steps", STEPS, "--reference-steps", FINE)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # the batches are gone
    return path


@pytest.fixture(scope="module")
def levels(tmp_path_factory, toy_directory, calibration):
    out = tmp_path_factory.mktemp("bundles") / "levels"
    succeed("compile", toy_directory, *GRAM, "--levels", "fine,high,fast=25", "--calibration", calibration, "-o", out)
    return out


def test_levels_hold_what_they_promise(levels, calibration):
    manifest = Bundle.open(levels).manifest
    facts = manifest.facts["levels"]
    assert list(manifest.programs) == ["uncached", "fine", "high", "fast"]
    assert facts["high"]["psnr_db"] > 40  # 45 were reached on the prompts that it was chosen by
    assert 20 < facts["fast"]["psnr_db"] < facts["high"]["psnr_db"]
    assert facts["fast"]["computed"] < facts["high"]["computed"]
    assert facts["fine"]["grid"] == FINE
    assert facts["fine"]["psnr_db_fine"] > facts["high"]["psnr_db_fine"]
    measured = load_statistics(calibration).prompts.places("measure")
    assert {level["num_prompts"] for level in facts.values()} == {len(measured)}
    assert "forecast" not in manifest.targets[0].engines  # the output cut forecasts nothing


def test_every_level_runs_and_they_differ(levels, toy_directory):
    model = load_model(find_model(str(toy_directory)))
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


def test_a_failed_gate_leaves_nothing(toy_directory, tmp_path):
    prompts = tmp_path.parent / "prompts.txt"
    prompts.write_text("\n".join(f"a circle of size {size}" for size in range(16)))
    wanted = ["--budget", 3, "--min-psnr", 200, "--prompts", prompts, "-o", tmp_path / "gated"]
    code, output = run_cli("compile", toy_directory, *GRAM, *wanted)
    assert code == QualityError.exit_code
    assert "level default reaches" in output
    assert "below --min-psnr 200" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [(["--guidance", "2"], "guidance is 1.0, wanted 2.0"), (["--reference-steps", "32"], "reference_steps is 16, wanted 32")],
)
def test_a_calibration_of_other_settings_is_refused_before_any_work(
    toy_directory, calibration, tmp_path, captures, changed, message
):
    given = ["--budget", 3, "--calibration", calibration, *changed, "-o", tmp_path / "x"]
    code, output = run_cli("compile", toy_directory, *GRAM, *given)
    assert code == InputError.exit_code
    assert message in output
    assert captures == []
    assert list(tmp_path.iterdir()) == []


def test_inspect_and_run_know_levels(levels, tmp_path):
    output = succeed("inspect", levels)
    assert "level fast" in output
    assert "held-out prompts when compiled" in output
    assert json.loads(succeed("inspect", levels, "--json"))["programs"]["fast"]["cut"] == "output"
    succeed("run", levels, "-p", "a red circle", "--level", "fast", "-o", tmp_path / "a.png")
    code, output = run_cli("run", levels, "-p", "x", "--level", "fats", "-o", tmp_path / "b.png")
    assert (code, "Did you mean 'fast'" in output) == (InputError.exit_code, True)


def test_one_compilation_captures_once_whatever_it_needs(toy_directory, tmp_path, captures):
    """It is trained, calibrated and measured in float32, and built in float16."""
    prompts = tmp_path.parent / "prompts.txt"
    prompts.write_text("\n".join(f"a ring of size {size}" for size in range(24)))
    wanted = ["--method", "lesa", "--steps", 8, "--interval", 3, "--set", "max_rounds=1", "--prompts", prompts, "--min-psnr", 1]
    succeed("compile", toy_directory, *wanted, "--dtype", "bfloat16", "--target", "eager", "-o", tmp_path / "half")
    assert len(captures) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["half"]
