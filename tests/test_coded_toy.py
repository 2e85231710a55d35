"""A method with a code on the toy, from the command line: trained and compiled in one, measured, and what it cannot have."""

import pytest
from toy_product import run_cli, succeed

import cachec
from cachec.runtime.bundle import Bundle

GIVEN = ["--steps", "8", "--interval", "3", "--target", "eager"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, toy_directory):
    out = tmp_path_factory.mktemp("coded") / "hyca"
    said = succeed("compile", toy_directory, *GIVEN, "--method", "hyca", "--set", "clusters=3", "--verify-passes", "-o", out)
    assert "trained predictor: trained now" in said
    return out


def test_it_is_trained_on_a_few_prompts_and_its_engines_have_groups(bundle):
    manifest = Bundle.open(bundle).manifest
    assert manifest.method["predictor"]["num_prompts"] == "8"
    with cachec.load(bundle) as loaded:
        (rows,) = [spec for spec in loaded.engines["forecast"].signature.inputs if spec.name == "coefficients"]
        groups = manifest.method["predictor"]["solvers_by_cluster"].count(",") + 1
        assert rows.shape[1] == groups == loaded.programs["default"].coefficients.shape[1]


def test_it_is_measured_beside_methods_that_have_engines_of_their_own(bundle):
    said = succeed("eval", bundle, "--against", "taylor:1,freqca:transform=fft", "--num", "1")
    assert "taylor:1" in said
    assert "freqca:transform=fft" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--interval", "3", "--set", "clusters=99"], "clusters is 99, above the 8 channels of a feature"),
        (["--levels", "high"], "hyca is trained for one schedule"),
        (["--schedule", "search", "--budget", "4"], "hyca is trained for one schedule; it cannot be searched"),
        (["--steps", "8,10"], "hyca is trained for one number of steps, and its code is in the engines"),
    ],
)
def test_what_it_cannot_have_is_refused(toy_directory, tmp_path, options, message):
    steps = [] if "--steps" in options else ["--steps", "8"]
    code, said = run_cli(
        "compile", toy_directory, "--method", "hyca", *steps, *options, "--target", "eager", "-o", tmp_path / "x"
    )
    assert code != 0
    assert message in said.replace("\n", " ")


def test_no_level_of_another_method_is_added(bundle, tmp_path):
    from cachec.compiler.commands.add_level import _method_for
    from cachec.runtime.errors import InputError

    with pytest.raises(InputError, match="engines of hyca keep features in a code of their own"):
        _method_for(Bundle.open(bundle).manifest, "newton", {})
