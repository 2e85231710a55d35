"""The main job on the toy, from the command line: train, compile, run, evaluate, report; replace, and be interrupted."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_product import killed, run_cli, succeed

import cachec
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.methods import lesa_training
from cachec.compiler.methods.parameters import load_predictor
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, InputError, OutputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED

PROMPTS = ["a red circle", "a blue ring"]
SCHEDULE = ["--steps", "8", "--interval", "3"]  # computes 0, 1, 2, 3, 5


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, toy_directory, toy_predictor):
    """LESA on the toy: folded and not, on two back ends."""
    root = tmp_path_factory.mktemp("bundles")
    for name, options in {"ort": [], "eager": ["--target", "eager"], "kept": ["--fold", "none", "--target", "eager"]}.items():
        succeed("compile", toy_directory, *SCHEDULE, "--predictor", toy_predictor, *options, "-o", root / name)
    return root


@pytest.fixture(scope="session")
def model(toy_directory):
    return load_model(find_model(str(toy_directory)))


@pytest.fixture(scope="session")
def conditions(bundles, model):
    return model.encode(PROMPTS, settings_of(Bundle.open(bundles / "ort").manifest), model.io.conditions)


def noise_of(session):
    return np.stack([make_noise(seed, session.latent_shape[1:]) for seed in (1, 2)])


def test_run_writes_pictures_and_does_not_replace_them(bundles, tmp_path):
    succeed("run", bundles / "ort", "-p", PROMPTS[0], "-o", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (24, 16)
        assert np.asarray(picture).std() > 5
    assert run_cli("run", bundles / "ort", "-p", PROMPTS[0], "-o", tmp_path / "one.png")[0] == OutputError.exit_code
    succeed("run", bundles / "ort", "-p", PROMPTS[0], "-p", PROMPTS[1], "-o", tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "x-1.png", "x-2.png"]
    assert (tmp_path / "x-1.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_compare_draws_one_sheet(bundles, tmp_path):
    output = succeed("run", bundles / "ort", "-p", PROMPTS[0], "-p", PROMPTS[1], "-o", tmp_path / "sheet.png", "--compare")
    assert "times as fast" in output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * 16


def test_the_uncached_program_equals_the_pipelines_own_loop(bundles, model, conditions):
    settings = settings_of(Bundle.open(bundles / "ort").manifest)
    with cachec.load(bundles / "ort") as loaded:
        session = loaded.session(level=UNCACHED, batch=2)
        latents = session.run(conditions, noise_of(session))
        np.testing.assert_allclose(latents, model.generate(conditions, noise_of(session), settings), atol=1e-5)


def test_back_ends_and_folding_agree(bundles, conditions):
    latents = {}
    for name in ("ort", "eager", "kept"):
        with cachec.load(bundles / name) as loaded:
            assert loaded.programs["default"].compute_steps == (0, 1, 2, 3, 5)
            latents[name] = loaded.denoise(conditions, [1, 2])
    np.testing.assert_allclose(latents["eager"], latents["ort"], atol=1e-5)
    np.testing.assert_allclose(latents["kept"], latents["ort"], atol=1e-4)


def test_the_predictor_is_inside_the_unfolded_engine_and_only_there(bundles):
    def inputs(name):
        return {spec.name for spec in Bundle.open(bundles / name).target.engines["forecast"].signature.inputs}

    assert {"sigmas", "step", "feature_0", "feature_1"} <= inputs("kept")
    assert {"coefficients", "bias", "features"} <= inputs("ort")
    assert not {"sigmas", "step"} & inputs("ort")


def test_bundles_name_no_path_of_this_machine(bundles, toy_directory):
    places = [str(Path(cachec.__file__).parent).encode(), b"site-packages"]
    for file in bundles.rglob("*"):
        if file.is_file():
            assert not any(place in file.read_bytes() for place in places), file


def test_inspect_tells_schedule_and_cost(bundles):
    output = succeed("inspect", bundles / "ort")
    assert "####·#··" in output
    assert "all hashes match" in output
    assert "of weights left the step" in output
    assert "MB for one sample at level default: weights" in output
    data = json.loads(succeed("inspect", bundles / "ort", "--json"))
    assert data["manifest"]["method"]["name"] == "lesa"
    assert [i["op"] for i in data["programs"]["default"]["instructions"]].count("compute") == 5


def test_a_change_of_method_leaves_the_engines_as_they_are(bundles, toy_directory, tmp_path):
    succeed(
        "compile",
        toy_directory,
        "--steps",
        "6",
        "--method",
        "taylor",
        "--set",
        "order=2",
        "--budget",
        "3",
        "-o",
        tmp_path / "t",
    )
    one, two = Bundle.open(bundles / "ort"), Bundle.open(tmp_path / "t")
    for name, artifact in one.target.engines.items():
        theirs = two.manifest.files[two.target.engines[name].path]
        assert theirs["sha256"] == one.manifest.files[artifact.path]["sha256"], name


def test_eval_writes_the_table_and_the_json(bundles, tmp_path):
    output = succeed("eval", bundles / "ort", "--num", "2", "--json", tmp_path / "eval.json")
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


def test_report_writes_a_page_with_pictures_and_plots(bundles, tmp_path):
    out = tmp_path / "report.html"
    output = succeed("report", bundles / "ort", "-o", out, "--num", "1", "--pictures", "1", "--against", "taylor:1,ab2")
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 6  # uncached, default, taylor:1, ab2, diffusers, fine
    assert page.count("<svg") == 4
    assert str(tmp_path) not in page
    assert "times as fast" in output


def test_what_cannot_be_compared_is_refused(bundles, toy_directory, tmp_path):
    code, output = run_cli("eval", bundles / "ort", "--against", "lesa:4", "--num", "1")
    assert (code, "no lesa predictor ships for toy with 8 steps, interval 4" in output) == (InputError.exit_code, True)
    assert run_cli("eval", bundles / "ort", "--num", "100000")[0] == InputError.exit_code
    shutil.copytree(toy_directory, tmp_path / "other")
    weights = tmp_path / "other/transformer/toy.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, output = run_cli("eval", bundles / "ort", "--model", tmp_path / "other")
    assert (code, "other weights" in output) == (InputError.exit_code, True)


def test_a_killed_compile_leaves_no_bundle_and_the_next_one_cleans_up(tmp_path, toy_directory):
    out, given = tmp_path / "out", ["compile", toy_directory, "--method", "reuse", "--steps", "6", "--target", "eager"]
    killed(*given, "-o", out, at="cachec.runtime.write:BundleWriter.commit*1", cwd=tmp_path)
    with pytest.raises(BundleError):
        Bundle.open(out)
    succeed(*given, "-o", out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_compile_with_force_leaves_the_old_bundle(bundles, tmp_path, toy_directory):
    shutil.copytree(bundles / "eager", tmp_path / "out")
    before = Bundle.open(tmp_path / "out").manifest.to_json()
    given = [*SCHEDULE, "--predictor", tmp_path / "missing", "-o", tmp_path / "out", "--force"]
    assert "does not exist" in run_cli("compile", toy_directory, *given)[1]
    assert Bundle.open(tmp_path / "out").manifest.to_json() == before


def test_force_replaces_a_bundle_and_removes_its_files(tmp_path, toy_directory):
    out = tmp_path / "out"
    for order in (1, 2):
        given = ["--method", "taylor", "--set", f"order={order}", "--steps", "6", "--target", "eager"]
        succeed("compile", toy_directory, *given, "-o", out, "--force")
    bundle = Bundle.open(out)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert files == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.method["options"] == {"order": 2}


@pytest.fixture
def training(tmp_path, toy_directory):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(default_prompts("shapes", "train")[:24]))
    return ["train", toy_directory, *SCHEDULE, "--set", "max_rounds=3", "--seed", "5", "--prompts", prompts]


def test_a_killed_training_goes_on_to_the_same_result(tmp_path, training):
    succeed(*training, "-o", tmp_path / "straight")
    killed(*training, "-o", tmp_path / "killed", at="cachec.compiler.methods.lesa_training:LesaTrainer._save*3", cwd=tmp_path)
    assert not (tmp_path / "killed").exists()
    succeed(*training, "-o", tmp_path / "killed")
    first, second = load_predictor(tmp_path / "straight"), load_predictor(tmp_path / "killed")
    assert first.facts["updates"] == second.facts["updates"]
    for name, tensor in first.tensors.items():
        np.testing.assert_allclose(tensor, second.tensors[name], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "prompts.txt", "straight"]


def test_a_training_that_stops_improving_ends_by_itself(tmp_path, training, monkeypatch):
    monkeypatch.setattr(lesa_training, "PATIENCE", (1, 1))
    monkeypatch.setattr(lesa_training, "ROUNDS_PER_EVALUATION", (1, 1))
    monkeypatch.setattr(lesa_training, "RATES", (0.0, 0.0))  # nothing can improve
    succeed(*[a for a in training if a not in ("--set", "max_rounds=3")], "-o", tmp_path / "p")
    curve = json.loads(load_predictor(tmp_path / "p").facts["curve"])
    assert [point["phase"] for point in curve] == [0, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("dtype", "distance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_follows_float32(tmp_path, toy_directory, toy_predictor, bundles, conditions, dtype, distance):
    given = [*SCHEDULE, "--predictor", toy_predictor, "--target", "eager", "--dtype", dtype, "--verify-passes"]
    succeed("compile", toy_directory, *given, "-o", tmp_path / "half")
    latents = []
    for path in (bundles / "eager", tmp_path / "half"):
        with cachec.load(path) as loaded:
            latents.append(loaded.denoise(conditions, [1, 2]))
    assert 0 < np.linalg.norm(latents[1] - latents[0]) < distance * np.linalg.norm(latents[0])
    assert Bundle.open(tmp_path / "half").manifest.settings["dtype"] == dtype


def test_one_forecast_agrees_folded_and_unfolded(bundles, conditions):
    """Both bundles to the end of their first forecasts: the latents then differ by the folding only."""
    latents = []
    for name in ("eager", "kept"):
        with cachec.load(bundles / name) as loaded:
            program, session = loaded.programs["default"], loaded.session(batch=2)
            session.begin(conditions, noise_of(session))
            gap = next(i for i, (a, b) in enumerate(pairwise(program.compute_steps)) if b > a + 1)
            for instruction in program.instructions:
                if instruction.steps == (program.compute_steps[gap + 1],):
                    break
                session.advance()
            latents.append(session.latents)
    np.testing.assert_allclose(*latents, atol=1e-5)
