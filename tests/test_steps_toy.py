"""Several numbers of steps in one bundle, where something is fitted and measured: each on its own calibration."""

import json

import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError

GIVEN = ["--method", "gram", "--budget", "3", "--steps", "8,6", "--target", "eager"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, toy_directory, toy_training):
    out = tmp_path_factory.mktemp("steps") / "steps.cachec"
    output = succeed("compile", toy_directory, *GIVEN, "--prompts", toy_training[-1], "-o", out)
    assert "computes 3 of 6 steps" in output
    assert not list(out.parent.glob("steps.cachec.*"))
    return out


def test_each_number_of_steps_is_fitted_and_measured_on_its_own(bundle):
    manifest = Bundle.open(bundle, verify=True).manifest
    assert manifest.step_counts == (8, 6)
    for steps in (8, 6):
        there = manifest.at(steps=steps)
        assert there.facts["calibration"]["steps"] == str(steps)
        assert there.facts["levels"]["default"]["psnr_db"] > 10
        assert there.settings["steps"] == steps
    assert len(manifest.targets) == 1
    assert len(list((bundle / "programs").iterdir())) == 8


def test_programs_of_all_run_on_the_same_engines(bundle):
    with cachec.load(bundle) as loaded:
        few = loaded.at(steps=6)
        assert few.engines is loaded.engines
        assert (loaded.programs["default"].num_steps, few.programs["default"].num_steps) == (8, 6)


def test_a_number_of_steps_can_be_evaluated(bundle, tmp_path):
    succeed("eval", bundle, "--steps", "6", "--num", "1", "--against", "reuse", "--json", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["setting"]["steps"], found["setting"]["size"]) == (6, "24x16")


def test_levels_are_added_to_what_their_calibration_is_of(bundle, toy_directory, toy_training, tmp_path):
    stats = tmp_path / "stats.safetensors"
    succeed("calibrate", toy_directory, "--steps", "6", "--prompts", toy_training[-1], "-o", stats)
    before = Bundle.open(bundle).manifest
    succeed("add-level", bundle, stats, "--budget", "2", "--name", "two")
    after = Bundle.open(bundle, verify=True).manifest
    assert after.programs == before.programs
    assert list(after.at(steps=6).programs) == [*before.at(steps=6).programs, "two"]
    assert after.at(steps=6).facts["levels"]["two"]["computed"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--budget", "7"], "budget is 7; it must lie between 1 and the number of steps, 6"),
        (["--method", "lesa", "--interval", "3", "--fold", "none"], "several numbers of steps"),
        (["--budget", "3", "--calibration", "c"], "--calibration is of one size and one number of steps, and 2 are asked for"),
    ],
)
def test_what_does_not_fit_all_is_refused(toy_directory, tmp_path, given, said):
    code, output = run_cli("compile", toy_directory, "--method", "gram", "--steps", "8,6", *given, "-o", tmp_path / "out")
    assert (code, said in output) == (InputError.exit_code, True), output
