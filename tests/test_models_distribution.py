"""The second distribution, ``cachec-models``: what is in the tree, and how models and predictors in one are found."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from toy_product import run_cli

from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.methods.parameters import Parameters, find_pretrained, predictor_bytes
from cachec.compiler.models import MODELS, find_model, load_model, named, outline_model, wrap_pipeline
from cachec.compiler.models.base import ModelSpec
from cachec.compiler.models.distribution import SOURCE, models_folder
from cachec.compiler.options import make_settings, read_options
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.version import VERSION

TREE = Path(__file__).resolve().parents[1] / "reference" / "models"
MB = 1e6
DISTILLED = {"steps": 8, "guidance": 1.0, "height": 32, "width": 48, "frames": 1, "text_tokens": 8, "prompts": "avatars"}
DISTILLED |= {"teacher": "tiny-flux"}

in_the_tree = pytest.mark.skipif(not TREE.is_dir(), reason="the source tree is not beside the tests")


@in_the_tree
def test_the_distribution_is_within_its_limits_and_packages_all_that_is_in_it():
    package = TREE / "cachec_models"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    patterns = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cachec_models"]
    assert set(files) <= {path for pattern in patterns for path in package.glob(pattern)}
    assert sum(path.stat().st_size for path in files) <= 95 * MB
    for folder in (path for path in package.iterdir() if (path / "model_index.json").is_file()):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * MB, folder
    assert f'VERSION = "{VERSION}"' in (package / "__init__.py").read_text()


SHIPPED = [index.parent for index in sorted(TREE.glob("cachec_models/*/model_index.json"))]


@pytest.mark.parametrize("folder", SHIPPED, ids=[folder.name for folder in SHIPPED])
def test_what_is_in_the_tree_is_installed_and_draws_what_its_defaults_say(folder):
    """``make test`` installs it."""
    spec = find_model(folder.name)
    assert Path(spec.source).samefile(folder)
    model, settings = load_model(spec, with_transformer=False), make_settings(spec, read_options({}).model)
    assert all(default_prompts(spec.prompts, use) for use in ("train", "measure", "eval"))
    shape = (
        (settings.frames, settings.height, settings.width, 3) if settings.frames > 1 else (settings.height, settings.width, 3)
    )
    latents = model.example_inputs(settings, batch=1)[model.io.latents].numpy()
    assert model.decode(latents, settings).shape == (1, *shape)


@pytest.fixture
def absent(monkeypatch):
    """As if nothing was installed."""
    monkeypatch.setattr("cachec.compiler.models.distribution.PACKAGE", "cachec_models_that_nobody_has")


@pytest.fixture
def installed(tmp_path, monkeypatch, flux_directory):
    """A distribution: ``small-flux``, which has a name here, and ``small-flux-8``, which has none and a teacher that has."""
    package = tmp_path / "cachec_models_of_a_test"
    (package / "predictors").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    (package / "small-flux").symlink_to(flux_directory)
    (package / "small-flux-8").mkdir()
    (package / "small-flux-8" / "model_index.json").symlink_to(flux_directory / "model_index.json")
    (package / "small-flux-8" / "distilled.json").write_text(json.dumps(DISTILLED))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("cachec.compiler.models.distribution.PACKAGE", package.name)
    spec = ModelSpec("small-flux", f"{SOURCE}small-flux", 32, 48, 8, 3.5, steps=4, packaged=True)
    monkeypatch.setitem(named.MODELS, "small-flux", spec)
    yield package
    assert package.name not in sys.modules


@pytest.mark.parametrize("name", ["tiny-hunyuan", "tiny-qwen"])
def test_a_model_of_a_distribution_that_is_absent_is_refused_with_the_command_that_brings_it(name, absent, tmp_path):
    assert models_folder() is None
    for find in (find_model, outline_model, lambda name: load_model(MODELS[name])):
        with pytest.raises(
            ModelUnavailableError, match=rf"{name} comes with cachec-models, .*: pip install \./reference/models"
        ):
            find(name)
    code, output = run_cli("list", "models")
    assert code == 0
    assert f"{name} comes with cachec-models, which is not installed" in output


def test_a_model_of_the_distribution_is_found_and_named_as_one_that_ships(installed):
    spec = find_model("small-flux")
    assert (spec.source, spec.portable_source, spec.height) == (str(installed / "small-flux"), "small-flux", 32)
    model = load_model(named.MODELS["small-flux"])
    assert outline_model("small-flux").spec == spec
    wrapped = wrap_pipeline(model.pipeline.__class__.from_pretrained(spec.source, local_files_only=True))
    assert (wrapped.spec, wrapped.weights_hash) == (spec, model.weights_hash)


def test_a_distilled_model_of_the_distribution_has_the_defaults_of_its_file_and_the_credit_of_its_teacher(installed):
    spec = find_model("small-flux-8")
    assert (spec.portable_source, spec.source, spec.steps) == ("small-flux-8", str(installed / "small-flux-8"), 8)
    assert "Johan Melin" in spec.credit
    assert "small-flux-8" in run_cli("list", "models")[1]
    with pytest.raises(InputError, match="Did you mean 'small-flux-8'"):
        find_model("small-flux-9")


def test_predictors_of_the_distribution_are_found_by_their_facts_and_may_be_float16(installed):
    known = Parameters({"rows": np.float16([0.1, 0.2])}, {"method": "m", "steps": "4", "weights_sha256": "aa"}, "now")
    (installed / "predictors" / "m-small-flux-4.safetensors").write_bytes(predictor_bytes(known))
    found = find_pretrained("m", {"steps": "4"}, lambda: "aa")
    assert found.origin == "ships with cachec-models (m-small-flux-4.safetensors)"
    assert found.arrays["rows"].dtype == np.float32
    assert find_pretrained("m", {"steps": "5"}, lambda: "aa") is None


def test_where_no_predictor_ships_the_command_that_trains_one_is_named_and_models_that_have_one(installed, tmp_path):
    known = Parameters({"rows": np.float16([0.1])}, {"method": "disca", "model": "small-flux-8", "weights_sha256": "aa"}, "now")
    (installed / "predictors" / "disca-small-flux-8.safetensors").write_bytes(predictor_bytes(known))
    given = ("compile", "small-flux", "--method", "disca", "--steps", "8", "--interval", "3", "-o", tmp_path / "out")
    code, output = run_cli(*given)
    assert code == 8
    command = "cachec train small-flux --method disca --steps 8 --interval 3 -o disca-small-flux-8-3.safetensors"
    assert command in " ".join(output.split())
    assert "of disca there are some for small-flux-8" in " ".join(output.split())
