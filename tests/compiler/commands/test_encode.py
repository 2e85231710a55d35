"""``cachec encode`` on the toy: the text encoders alone, into one file."""

import numpy as np
import pytest
from toy_model import POISON, SETTINGS
from toy_product import run_cli, succeed

from cachec.compiler.calibration.conditions import load_conditions
from cachec.compiler.calibration.uses import calibration_prompts
from cachec.compiler.models import find_model, load_model
from cachec.runtime.errors import InputError, OutputError

PROMPTS = [f"a circle of size {size}" for size in range(10)]


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_conditions_are_the_models_own_for_the_prompts_of_a_calibration(tmp_path, toy_directory, listed):
    out = tmp_path / "c.safetensors"
    output = succeed("encode", toy_directory, "--prompts", listed, "--num", 8, "-o", out)
    read = load_conditions(out)
    assert read.prompts == calibration_prompts("avatars", PROMPTS[:8])
    model = load_model(find_model(str(toy_directory)))
    np.testing.assert_array_equal(read.conditions["prompt"], model.encode(read.prompts.prompts, SETTINGS, ["prompt"])["prompt"])
    read.check("toy", SETTINGS)
    assert f"{len(read.prompts.places('fit'))} to fit on" in output


def test_flux_says_its_conditions_without_its_transformer():
    with_it, without = (load_model(find_model("tiny-flux"), with_transformer=given) for given in (True, False))
    assert without.io == with_it.io
    assert without.pipeline.transformer is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["--num", 11], InputError, "num is 11, but there are only 10 prompts"),
        (["--text-tokens", 0], InputError, "text-tokens is 0"),
        (["-o", "{}/prompts.txt"], OutputError, "exists already: pass --force"),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(tmp_path, toy_directory, listed, given, error, message):
    given = [str(one).format(tmp_path) for one in given]
    code, output = run_cli("encode", toy_directory, "--prompts", listed, "--num", 8, "-o", tmp_path / "c", *given)
    assert code == error.exit_code
    assert message in output
    assert sorted(tmp_path.iterdir()) == [listed]


def test_a_prompt_whose_conditions_are_not_finite_is_named(tmp_path, toy_directory, listed):
    listed.write_text("\n".join([*PROMPTS, POISON]))
    code, output = run_cli("encode", toy_directory, "--prompts", listed, "--num", 11, "-o", tmp_path / "c")
    assert code == InputError.exit_code
    assert f"prompt of prompt '{POISON}' holds NaN" in output
