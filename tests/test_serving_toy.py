"""The toy on a machine that serves: a bundle and encoded prompts, and no torch."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.compiler.calibration.calibration import open_calibration, relative_errors
from cachec.compiler.calibration.conditions import load_conditions, subject_of_bundle
from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.statistics import load_statistics, save_statistics
from cachec.compiler.commands import add_level
from cachec.compiler.frontend import check
from cachec.compiler.models import find_model, load_model
from cachec.compiler.request import make_request
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, InputError, OutputError

STEPS = ("--steps", "8")
PROMPTS = [f"a circle of size {size}" for size in range(10)]
WITHOUT = """
import sys
from dataclasses import replace
for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
    sys.modules[name] = None
from cachec.cli import start
start()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def listed(place):
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return ("--prompts", place / "prompts.txt", "--num", "10")


@pytest.fixture(scope="module")
def bundle(place, toy_directory):
    succeed("compile", toy_directory, *STEPS, "--method", "adams", "--interval", "2", "-o", place / "toy.cachec")
    return place / "toy.cachec"


@pytest.fixture(scope="module")
def conditions(place, toy_directory, listed):
    succeed("encode", toy_directory, *listed, "-o", place / "conditions.safetensors")
    return place / "conditions.safetensors"


@pytest.fixture(scope="module")
def stats(place, bundle, conditions):
    served("calibrate", bundle, "--conditions", conditions, "-o", place / "stats.safetensors")
    return place / "stats.safetensors"


def served(*arguments):
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_bundle_is_calibrated_without_torch_as_its_model_is(place, toy_directory, stats, listed):
    succeed("calibrate", toy_directory, *STEPS, *listed, "-o", place / "expected")
    read, expected = load_statistics(stats), load_statistics(place / "expected")
    assert dict(read.facts) == dict(expected.facts)
    for name in ("noise", "latents", "velocity_gram", "feature_gram"):
        np.testing.assert_allclose(getattr(read, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_compiling_the_model_takes_the_calibration_of_its_bundle(toy_directory, stats):
    model = load_model(find_model(str(toy_directory)))
    options = {"method": "gram", "budget": 3, "calibration": stats}
    assert check(model, make_request(model.spec, steps=8, **options)).statistics.origin == str(stats)
    with pytest.raises(InputError, match="steps is 8, wanted 9"):
        check(model, make_request(model.spec, steps=9, **options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompts", "p.txt"], "--prompts cannot be used with a bundle, which has no text encoders"),
        (["--num", 8], "--num cannot be used with a bundle"),
        (["--steps", 50], "steps is 50, but the bundle was compiled for 8"),
        (["--reference-steps", 16], "reference-steps is 16, but a bundle has the noise levels of its own steps only"),
        (["--seed", -1], "seed is -1"),
    ],
)
def test_what_a_bundle_does_not_leave_open_is_refused(tmp_path, bundle, conditions, given, message):
    code, output = run_cli("calibrate", bundle, "--conditions", conditions, *given, "-o", tmp_path / "s")
    assert code == InputError.exit_code
    assert message in output
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_takes_conditions_and_a_model_none(tmp_path, bundle, toy_directory, conditions):
    _, output = run_cli("calibrate", bundle, "-o", tmp_path / "s")
    assert "a bundle has no text encoders: give --conditions" in output
    _, output = run_cli("calibrate", toy_directory, "--conditions", conditions, "-o", tmp_path / "s")
    assert "encodes its prompts itself: leave --conditions out" in output


def test_conditions_for_other_settings_are_refused(tmp_path, toy_directory, bundle, listed):
    succeed("encode", toy_directory, *listed, "--guidance", 2, "-o", tmp_path / "c")
    code, output = run_cli("calibrate", bundle, "--conditions", tmp_path / "c", "-o", tmp_path / "s")
    assert code == InputError.exit_code
    assert "guidance is 2.0, wanted 1.0" in output


def test_a_prompt_that_was_not_encoded_is_named(bundle, conditions):
    with cachec.load(bundle) as loaded, pytest.raises(InputError, match="lack 1 of 2 prompts, such as 'a star'"):
        subject_of_bundle(loaded, load_conditions(conditions)).encode([PROMPTS[0], "a star"])


def test_noise_levels_of_other_steps_are_refused(bundle, conditions):
    with cachec.load(bundle) as loaded:
        subject = subject_of_bundle(loaded, load_conditions(conditions))
        assert subject.own_sampling.num_steps == 8
        with pytest.raises(InputError, match="its own 8 steps, not those of 16"):
            subject.sampling(16)


def test_engines_of_small_batches_are_given_no_larger_ones(bundle, conditions, stats, monkeypatch):
    batches, real = [], EngineEvaluator.evaluate
    monkeypatch.setattr(EngineEvaluator, "evaluate", lambda self, x, *given: batches.append(len(x)) or real(self, x, *given))
    with cachec.load(bundle) as loaded:
        evaluator = EngineEvaluator(loaded.engines, loaded.io, max_batch=4)
        calibration = open_calibration(
            load_statistics(stats), subject_of_bundle(loaded, load_conditions(conditions)), evaluator
        )
        calibration.velocities(calibration.noise(), 1.0, 0)
    assert batches == [4, 4, 2]


def test_a_bundle_that_does_not_name_its_sampler_is_refused(bundle, conditions):
    with cachec.load(bundle) as loaded:
        settings = {name: value for name, value in loaded.manifest.settings.items() if name != "sampler"}
        older = replace(loaded, manifest=replace(loaded.manifest, settings=settings))
        with pytest.raises(BundleError, match="does not say which sampler it is for: compile it again"):
            subject_of_bundle(older, load_conditions(conditions))


@pytest.fixture
def copy(tmp_path, bundle):
    return shutil.copytree(bundle, tmp_path / "b.cachec")


def level_facts(root):
    return Bundle.open(root, verify=True).manifest.facts["levels"]


def test_a_level_is_added_without_torch_and_no_engine_changes(copy, bundle, stats, conditions):
    output = served("add-level", copy, stats, "--conditions", conditions, "--budget", 3, "--set", "polish=0")
    assert "level budget-3  computes 3 of 8 steps, by gram" in output
    before, after = Bundle.open(bundle).manifest, Bundle.open(copy, verify=True).manifest
    assert after.targets == before.targets
    assert {name: after.files[name] for name in before.files} == before.files
    facts = level_facts(copy)["budget-3"]
    assert "psnr_db" not in facts
    assert (facts["method"], facts["options"], facts["computed"]) == (
        "gram",
        {"polish": 0, "choose": "pictures", "times": "sampler"},
        3,
    )
    measured = load_statistics(stats).prompts.only("measure").prompts
    assert facts["num_prompts"] == len(measured)
    with cachec.load(copy) as loaded:
        calibration = open_calibration(
            load_statistics(stats), subject_of_bundle(loaded, load_conditions(conditions)), EngineEvaluator.of(loaded)
        ).of("measure")
        final, wanted = calibration.play(loaded.programs["budget-3"]), calibration.latents(8)
        assert relative_errors(final, wanted).mean() == pytest.approx(facts["latent_error"], rel=1e-3)
        assert loaded.default_level == "default"


def test_with_its_model_a_level_is_added_for_a_psnr_and_replaced_by_force(copy, stats):
    succeed("add-level", copy, stats, "--target-psnr", 20, "--name", "near", "--set", "polish=0")
    facts, files = level_facts(copy)["near"], Bundle.open(copy).manifest.programs["near"]
    assert facts["goal"] == "PSNR of 20 dB"
    assert facts["psnr_db"] is None or facts["psnr_db"] > 10
    given = ["--budget", 7, "--name", "near", "--method", "l2p"]
    code, output = run_cli("add-level", copy, stats, *given)
    assert code == OutputError.exit_code
    assert "has a level near already: pass --force" in output
    succeed("add-level", copy, stats, *given, "--force")
    assert (level_facts(copy)["near"]["method"], level_facts(copy)["near"]["computed"]) == ("l2p", 7)
    assert not any((copy / name).exists() for name in files.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing is asked for: give --budget or --target-psnr"),
        (["--budget", 3, "--target-psnr", 30], "--budget and --target-psnr contradict each other"),
        (["--budget", 9], "budget is 9; it must lie between 1 and the number of steps, 8"),
        (["--budget", 3, "--method", "lesa"], "lesa works on the hidden cut, and the bundle's engines are of the output cut"),
        (["--budget", 3, "--method", "bns"], "bns takes the model's graphs to make a level of: give it to cachec compile"),
        (["--budget", 3, "--name", "uncached"], "level 'uncached' is reserved"),
        (["--budget", 3, "--name", "a/b"], "level 'a/b' is not a name"),
        (["--target-psnr", 30, "--conditions", "c"], "--target-psnr is of pictures"),
        (["--budget", 3, "--conditions", "c"], "conditions c does not exist: make one with cachec encode"),
        (["--budget", 3, "--seed", -1], "seed is -1"),
    ],
)
def test_a_level_that_cannot_be_is_refused_and_the_bundle_stays(copy, stats, given, message):
    before = sorted(copy.rglob("*"))
    code, output = run_cli("add-level", copy, stats, *given)
    assert code == InputError.exit_code
    assert message in output
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(("name", "value", "wanted"), [("guidance", "7.0", "1.0"), ("precision", "bfloat16", "float32")])
def test_a_calibration_of_something_else_makes_no_level(tmp_path, copy, stats, conditions, name, value, wanted):
    statistics = load_statistics(stats)
    other = {fact: text for fact, text in statistics.facts.items() if fact != "format"} | {name: value}
    save_statistics(replace(statistics, facts=other), tmp_path / "other")
    code, output = run_cli("add-level", copy, tmp_path / "other", "--conditions", conditions, "--budget", 3)
    assert code == InputError.exit_code
    assert f"{name} is {value}, wanted {wanted}" in output
    assert "budget-3" not in Bundle.open(copy).manifest.programs


def test_engines_in_low_precision_take_a_calibration_in_float32_and_that_is_said(bundle, stats, conditions, caplog):
    with cachec.load(bundle) as loaded:
        subject = subject_of_bundle(loaded, load_conditions(conditions))
    add_level._check_statistics(load_statistics(stats), subject, "float32")
    assert not caplog.records
    add_level._check_statistics(load_statistics(stats), subject, "bfloat16")
    assert "is fitted to runs in float32, which" in caplog.text
