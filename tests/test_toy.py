"""The main job on the toy, from the command line: train, compile, run, evaluate, report; replace, and be interrupted."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from toy_product import TOY_SCHEDULE, run_cli, succeed

import cachec
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

PROMPTS = ["a red circle", "a blue ring"]


@pytest.fixture(scope="session")
def model(toy_directory):
    return load_model(find_model(str(toy_directory)))


@pytest.fixture(scope="session")
def conditions(toy_bundles, model):
    return model.encode(PROMPTS, settings_of(Bundle.open(toy_bundles / "both").manifest), model.io.conditions)


@pytest.fixture(scope="module")
def eager(toy_bundles):
    """Opened, for it takes a second: the folded one and ``kept``."""
    with cachec.load(toy_bundles / "both", target="eager") as folded, cachec.load(toy_bundles / "kept") as kept:
        yield folded, kept


def noise_of(session):
    return np.stack([make_noise(seed, session.latent_shape[1:]) for seed in (1, 2)])


def test_the_uncached_program_equals_the_pipelines_own_loop(toy_bundles, model, conditions):
    settings = settings_of(Bundle.open(toy_bundles / "both").manifest)
    with cachec.load(toy_bundles / "both") as loaded:
        session = loaded.session(level=UNCACHED, batch=2)
        latents = session.run(conditions, noise_of(session))
        np.testing.assert_allclose(latents, model.generate(conditions, noise_of(session), settings), atol=1e-5)


def test_back_ends_and_folding_agree(toy_bundles, eager, conditions):
    with cachec.load(toy_bundles / "both", target="ort") as ort:
        assert all(loaded.programs["default"].compute_steps == (0, 1, 2, 3, 5) for loaded in (ort, *eager))
        wanted, folded, kept = (loaded.denoise(conditions, [1, 2]) for loaded in (ort, *eager))
    np.testing.assert_allclose(folded, wanted, atol=1e-5)
    np.testing.assert_allclose(kept, wanted, atol=1e-4)


def test_the_predictor_is_inside_the_unfolded_engine_and_only_there(toy_bundles):
    def inputs(name):
        return {spec.name for spec in Bundle.open(toy_bundles / name).target.engines["forecast"].signature.inputs}

    assert {"sigmas", "step", "feature_0", "feature_1"} <= inputs("kept")
    assert {"coefficients", "bias", "features"} <= inputs("both")
    assert not {"sigmas", "step"} & inputs("both")


def test_bundles_name_no_path_of_this_machine(toy_bundles, toy_directory):
    places = [str(Path(cachec.__file__).parent).encode(), b"site-packages"]
    for file in toy_bundles.rglob("*"):
        if file.is_file():
            assert not any(place in file.read_bytes() for place in places), file


def test_inspect_tells_schedule_and_cost(toy_bundles):
    output = succeed("inspect", toy_bundles / "both")
    assert "####·#··" in output
    assert "all hashes match" in output
    assert "of weights left the step" in output
    assert "MB for one sample at level default: weights" in output
    data = json.loads(succeed("inspect", toy_bundles / "both", "--json"))
    assert data["manifest"]["method"]["name"] == "lesa"
    assert [i["op"] for i in data["programs"]["default"]["instructions"]].count("compute") == 5


def test_a_change_of_method_leaves_the_engines_as_they_are(toy_bundles, toy_directory, tmp_path):
    given = ["--steps", "6", "--method", "taylor", "--set", "order=2", "--budget", "3", "--target", "eager"]
    succeed("compile", toy_directory, *given, "-o", tmp_path / "t")
    one, two = Bundle.open(toy_bundles / "both").manifest, Bundle.open(tmp_path / "t").manifest
    (old,), (new,) = ([target for target in made.targets if target.backend == "eager"] for made in (one, two))
    assert old.engines.keys() == new.engines.keys()
    for name, artifact in old.engines.items():
        assert two.files[new.engines[name].path]["sha256"] == one.files[artifact.path]["sha256"], name


def test_eval_writes_the_table_and_the_json(toy_bundles, tmp_path):
    output = succeed("eval", toy_bundles / "both", "--num", "2", "--json", tmp_path / "eval.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert list(rows) == ["uncached", "default", "taylor:1", "taylor:2", "reuse", "plain", "unipc", "diffusers"]
    fields = {"name", "compute_steps", "psnr_db", "psnr_db_min", "psnr_db_fine", "ssim", "latent_error", "latent_error_max",
              "seconds_loop", "seconds_total", "speedup_vs_uncached", "speedup_vs_eager"}  # fmt: skip
    assert all(fields <= set(row) for row in rows.values())
    assert rows["uncached"]["psnr_db"] is None
    assert rows["default"]["compute_steps"] == rows["plain"]["compute_steps"] == rows["unipc"]["compute_steps"] == 5
    assert rows["diffusers"]["latent_error"] < 1e-5
    assert rows["taylor:1"]["latent_error"] < rows["reuse"]["latent_error"]
    assert "**default**" in output


def test_report_writes_a_page_with_pictures_and_plots(toy_bundles, tmp_path):
    out = tmp_path / "report.html"
    output = succeed("report", toy_bundles / "both", "-o", out, "--num", "1", "--pictures", "1", "--against", "taylor:1,ab2")
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 6  # uncached, default, taylor:1, ab2, diffusers, fine
    assert page.count("<svg") == 4
    assert str(tmp_path) not in page
    assert "times as fast" in output


def test_what_cannot_be_compared_is_refused(toy_bundles, toy_directory, tmp_path):
    code, output = run_cli("eval", toy_bundles / "both", "--against", "lesa:4", "--num", "1")
    assert (code, "no lesa predictor ships for toy with 8 steps, interval 4" in output) == (InputError.exit_code, True)
    assert run_cli("eval", toy_bundles / "both", "--num", "100000")[0] == InputError.exit_code
    shutil.copytree(toy_directory, tmp_path / "other")
    weights = tmp_path / "other/transformer/toy.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, output = run_cli("eval", toy_bundles / "both", "--model", tmp_path / "other")
    assert (code, "other weights" in output) == (InputError.exit_code, True)


@pytest.mark.parametrize(
    ("dtype", "targets", "distance"),
    [pytest.param("float16", ("ort", "eager"), 2e-3, marks=pytest.mark.slow), ("bfloat16", ("eager",), 2e-2)],
)
def test_half_precision_follows_float32(tmp_path, toy_directory, toy_predictor, eager, conditions, dtype, targets, distance):
    given = [*TOY_SCHEDULE, "--predictor", toy_predictor, "--dtype", dtype, "--verify-passes"]
    succeed("compile", toy_directory, *given, *(f"--target={name}" for name in targets), "-o", tmp_path / "half")
    for target in targets:
        with cachec.load(tmp_path / "half", target=target) as half:
            assert half.manifest.settings["dtype"] == dtype
            for level in ("default", UNCACHED):
                wanted, got = (loaded.denoise(conditions, [1, 2], level=level) for loaded in (eager[0], half))
                assert 0 < np.linalg.norm(got - wanted) < distance * np.linalg.norm(wanted)


def test_one_forecast_agrees_folded_and_unfolded(eager, conditions):
    """Both bundles to the end of their first forecasts: the latents then differ by the folding only."""
    latents = []
    for loaded in eager:
        program, session = loaded.programs["default"], loaded.session(batch=2)
        session.begin(conditions, noise_of(session))
        gap = next(i for i, (a, b) in enumerate(pairwise(program.compute_steps)) if b > a + 1)
        for instruction in program.instructions:
            if instruction.steps == (program.compute_steps[gap + 1],):
                break
            session.advance()
        latents.append(session.latents)
    np.testing.assert_allclose(*latents, atol=1e-5)
