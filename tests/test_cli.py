"""The command line with wrong input: a clear message, an exit code of its own kind, nothing half-written."""

import json
import os
import subprocess
import sys

import pytest
import torch
from toy_product import run_cli as cachec

from cachec.runtime.errors import (
    BundleError,
    InputError,
    ModelUnavailableError,
    OutputError,
    PredictorError,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-flx"], "unknown model 'tiny-flx'. Did you mean 'tiny-flux'?"),
        (["tiny-flux", "--method", "lessa"], "unknown method 'lessa'. Did you mean 'lesa'?"),
        (["tiny-flux", "--backend", "orrt"], "unknown target 'orrt'. Did you mean 'ort'?"),
        (["tiny-flux", "--interval", "0"], "interval is 0"),
        (["tiny-flux", "--budget", "51"], "budget is 51"),
        (["tiny-flux", "--schedule", "1,2"], "must start at step 0"),
        (["tiny-flux", "--schedule", "0,9,2"], "must be sorted"),
        (["tiny-flux", "--schedule", "0,60"], "computes step 60"),
        (["tiny-flux", "--schedule", "0,a"], "not a list of steps"),
        (["tiny-flux", "--steps", "0"], "steps is 0"),
        (["tiny-flux", "--interval", "5", "--budget", "9"], "contradict each other"),
        (["tiny-flux", "--dtype", "int8"], "dtype is 'int8'"),
        (["tiny-flux", "--device", "gpu"], "device is 'gpu'; use cpu, cuda"),
        (["tiny-flux", "--fold", "maybe"], "fold is 'maybe'"),
        (["tiny-flux", "--batch", "0"], "batch is 0"),
        (["tiny-flux", "--seed", "-1"], "seed is -1"),
        (["tiny-flux", "--method", "taylor", "--set", "order=two"], "whole number"),
        (["tiny-flux", "--method", "taylor", "--set", "odrer=2"], "Did you mean 'order'?"),
        (["tiny-flux", "--method", "taylor", "--set", "order"], "name=value"),
        (["tiny-flux", "--prompts", "no-such-file.txt"], "no-such-file.txt cannot be read"),
    ],
)
def test_wrong_compile_input_is_refused(tmp_path, arguments, message):
    out = tmp_path / "out.cachec"
    code, output = cachec("compile", *arguments, "-o", out)
    assert code == InputError.exit_code, output
    assert message in output
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_reached_names_three_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    code, output = cachec("compile", "flux", "-o", tmp_path / "out")
    assert code == ModelUnavailableError.exit_code
    assert "black-forest-labs/FLUX.1-dev" in output
    assert all(way in output for way in ("(a)", "(b)", "(c)", "HF_HOME"))
    assert not (tmp_path / "out").exists()


def test_directory_that_is_no_pipeline_is_refused(tmp_path):
    code, output = cachec("compile", tmp_path, "-o", tmp_path / "out")
    assert code == ModelUnavailableError.exit_code
    assert "model_index.json" in output


def test_pipeline_of_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    code, output = cachec("compile", tmp_path, "--method", "reuse", "-o", tmp_path / "out")
    assert code == InputError.exit_code
    assert "StableDiffusionPipeline" in output


def test_existing_output_needs_force(tmp_path, toy_directory):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps({"format": "cachec-bundle"}))
    code, output = cachec("compile", toy_directory, "-o", out)
    assert code == OutputError.exit_code
    assert "--force" in output


def test_a_foreign_manifest_does_not_make_a_directory_a_bundle(tmp_path, toy_directory):
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web application"}))
    code, output = cachec("compile", toy_directory, "-o", tmp_path, "--force")
    assert code == OutputError.exit_code
    assert "other things" in output
    assert (tmp_path / "manifest.json").exists()


def test_json_result_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    (tmp_path / "eval.json").write_text("{}")
    code, output = cachec("eval", tmp_path, "--json", tmp_path / "eval.json")
    assert code == OutputError.exit_code
    assert "--force" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictor", "a", "--prompts", "b"], "contradict"),
        (["--predictor", "a", "--method", "taylor"], "no trained predictor"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--seed", str(2**40)], "seed is"),
    ],
)
def test_options_that_cannot_go_together_or_be_used_are_refused(tmp_path, arguments, message):
    code, output = cachec("compile", "tiny-flux", *arguments, "-o", tmp_path / "out")
    assert code == InputError.exit_code
    assert message in output


def test_lesa_with_nothing_to_forecast_is_refused(tmp_path, toy_directory):
    code, output = cachec("compile", toy_directory, "--interval", "1", "-o", tmp_path / "out")
    assert code == InputError.exit_code
    assert "nothing for lesa to forecast" in output
    assert list(tmp_path.iterdir()) == []


def test_directory_with_other_things_is_never_replaced(tmp_path, toy_directory):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, output = cachec("compile", toy_directory, "-o", tmp_path, "--force")
    assert code == OutputError.exit_code
    assert "other things" in output
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_place_that_cannot_be_written_is_refused(tmp_path, toy_directory):
    (tmp_path / "file").write_text("")
    code, output = cachec("compile", toy_directory, "--method", "reuse", "-o", tmp_path / "file" / "out")
    assert code == OutputError.exit_code
    assert "cannot write" in output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_missing_write_permission_is_refused(tmp_path, toy_directory):
    tmp_path.chmod(0o500)
    code, output = cachec("compile", toy_directory, "--method", "reuse", "-o", tmp_path / "out")
    assert code == OutputError.exit_code
    assert "cannot write" in output


def test_missing_predictor_file_is_refused(tmp_path, toy_directory):
    code, output = cachec("compile", toy_directory, "--predictor", tmp_path / "none", "-o", tmp_path / "out")
    assert code == PredictorError.exit_code
    assert "does not exist" in output


def test_file_that_is_no_predictor_is_refused(tmp_path, toy_directory):
    (tmp_path / "p.safetensors").write_bytes(b"not a tensor")
    code, output = cachec("compile", toy_directory, "--predictor", tmp_path / "p.safetensors", "-o", tmp_path / "out")
    assert code == PredictorError.exit_code
    assert "is not a predictor file, or is damaged" in output


@pytest.mark.parametrize("changed", [["--steps", "28"], ["--interval", "2"]])
def test_predictor_for_other_settings_is_refused_before_the_model_is_captured(
    tmp_path, toy_directory, toy_predictor, captures, changed
):
    given = ["--steps", "8", "--interval", "3", "--predictor", toy_predictor, *changed]
    code, output = cachec("compile", toy_directory, *given, "-o", tmp_path / "out")
    assert code == PredictorError.exit_code
    assert "of something else" in output
    assert "schedule is 0,1,2,3,5" in output
    assert list(tmp_path.iterdir()) == []
    assert captures == []


def test_predictor_of_another_model_is_refused(tmp_path, toy_predictor):
    given = ["--steps", "8", "--interval", "3", "--predictor", toy_predictor]
    code, output = cachec("compile", "tiny-flux", *given, "-o", tmp_path / "out")
    assert code == PredictorError.exit_code
    assert "weights_sha256" in output


@pytest.mark.parametrize("command", [["inspect"], ["run", "-p", "x", "-o", "x.png"], ["eval"], ["report", "-o", "x.html"]])
def test_what_is_no_bundle_is_refused(tmp_path, command):
    code, output = cachec(command[0], tmp_path, *command[1:])
    assert code == BundleError.exit_code
    assert "is not a bundle" in output


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", ""])
def test_what_is_no_device_is_refused(toy_bundle, device):
    code, output = cachec("run", toy_bundle, "-p", "x", "-o", "x.png", "--device", device)
    assert code == InputError.exit_code
    assert f"device is {device!r}; use cpu, cuda" in output


def test_a_device_is_given_once(toy_bundle, tmp_path):
    code, output = cachec("run", toy_bundle, "-p", "x", "-p", "y", "-o", tmp_path / "x.png", "--device", "cuda", "--device=cpu")
    assert code == InputError.exit_code
    assert output == "error: --device is given twice, and one is taken: leave the other out\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(toy_bundle):
    code, output = cachec("run", toy_bundle, "-p", "x", "-o", "x.png", "--device", "cuda")
    assert code == InputError.exit_code
    assert "torch.cuda.is_available() is False" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tailor:1"], "Did you mean 'taylor'?"),
        (["--against", "taylor:x"], "whole number"),
        (["--num", "0"], "num is 0"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
@pytest.mark.parametrize("command", [["eval"], ["report", "-o", "report.html"]])
def test_wrong_evaluation_input_is_refused(tmp_path, command, arguments, message):
    code, output = cachec(command[0], tmp_path, *command[1:], *arguments)
    assert code == InputError.exit_code
    assert message in output


@pytest.mark.parametrize("level", ["fats", "uncached"])
@pytest.mark.parametrize("command", [["eval"], ["report", "-o", "report.html"]])
def test_unknown_level_is_refused(toy_bundle, command, level):
    code, output = cachec(command[0], toy_bundle, *command[1:], "--level", level)
    assert code == InputError.exit_code
    assert f"unknown level '{level}'" in output


def test_report_of_another_kind_is_refused(tmp_path):
    code, output = cachec("report", tmp_path, "-o", tmp_path / "report.pdf")
    assert code == InputError.exit_code
    assert "name it .html, .md or .json" in output


def test_report_that_exists_needs_force(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    code, output = cachec("report", tmp_path, "-o", tmp_path / "report.html")
    assert code == OutputError.exit_code
    assert "--force" in output


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt_is_refused(tmp_path, prompt):
    code, output = cachec("run", tmp_path, "-p", prompt, "-o", tmp_path / "x.png")
    assert code == InputError.exit_code
    assert "prompt 1 is empty" in output


def test_method_that_needs_no_training_is_not_trained(tmp_path, toy_directory):
    code, output = cachec("train", toy_directory, "--method", "taylor", "-o", tmp_path / "t.safetensors")
    assert code == PredictorError.exit_code
    assert "nothing to train" in output


def test_too_few_training_prompts_are_refused(tmp_path, toy_directory):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue ring\n")
    code, output = cachec(
        "train", toy_directory, "--prompts", tmp_path / "prompts.txt", "--steps", "6", "-o", tmp_path / "p.safetensors"
    )
    assert code == InputError.exit_code
    assert "2 prompts are too few" in output


@pytest.mark.parametrize("what", ["models", "methods", "backends"])
def test_list_names_what_exists(what):
    code, output = cachec("list", what)
    assert code == 0
    assert {"models": "tiny-flux", "methods": "lesa", "backends": "ort"}[what] in output


def test_what_is_said_for_users_is_shown_and_the_rest_of_the_libraries_is_not():
    code = (
        "import logging, warnings\n"
        "from cachec import cli\n"
        "def speak():\n"
        "    logging.getLogger('cachec.compiler').warning('a prompt is cut')\n"
        "    logging.getLogger('cachec.compiler').info('details')\n"
        "    logging.getLogger('diffusers.pipelines').warning('of a library')\n"
        "    warnings.warn('something\\n    odd', UserWarning)\n"
        "    warnings.warn('write it otherwise', FutureWarning)\n"
        "cli.main = speak\n"
        "cli.start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["a prompt is cut", "UserWarning: something odd"]
