"""The main job on the real reference model: compile, run, evaluate; on ONNX Runtime and on eager."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import cachec
from cachec.cli import main
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import TRAINING_SEED_BASE
from cachec.compiler.methods.parameters import PRETRAINED, load_predictor
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.models import MODELS, TINY_FLUX_DIR, load_model
from cachec.compiler.models.base import settings_of
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session

PROMPT = "a large red circle at the left on a dark background"


def run_cli(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="session")
def model():
    return load_model(MODELS["tiny-flux"])


@pytest.fixture(scope="session")
def lesa_bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "lesa.cachec"
    output = run_cli("compile", "tiny-flux", "--method", "lesa", "--interval", "7", "-o", out, "--verify-passes")
    assert "ships with cachec" in output
    return out


@pytest.fixture(scope="session")
def unfolded_bundle(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("bundles") / "unfolded.cachec"
    request = make_request(MODELS["tiny-flux"], method="lesa", interval=7, fold="none")
    compile_bundle(model, request, out)
    return out


@pytest.fixture(scope="session")
def eager_bundle(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("bundles") / "eager.cachec"
    compile_bundle(model, make_request(MODELS["tiny-flux"], method="lesa", interval=7, targets="eager"), out)
    return out


@pytest.fixture(scope="session")
def conditions(model, lesa_bundle):
    prompts = [PROMPT, "a small blue ring at the top on a grey background"]
    return model.encode(prompts, settings_of(Bundle.open(lesa_bundle).manifest), model.io.conditions)


def test_the_reference_model_loads_as_any_flux_pipeline_does():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, height=64, width=64, max_sequence_length=16, num_inference_steps=4).images[0]
    assert picture.size == (64, 64)


def test_the_reference_model_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in TINY_FLUX_DIR.rglob("*") if file.is_file()) <= 25e6


def test_prompts_and_seeds_for_training_are_not_those_for_evaluation():
    for name in ("shapes", "general"):
        assert not set(default_prompts(name, "train")) & set(default_prompts(name, "eval"))
    assert TRAINING_SEED_BASE > 2**31


@pytest.mark.smoke
def test_bundle_computes_the_ten_published_steps(lesa_bundle):
    program = Bundle.open(lesa_bundle).program()
    assert program.compute_steps == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
    assert program.num_steps == 50


@pytest.mark.smoke
def test_run_writes_a_picture_and_refuses_to_replace_it(lesa_bundle, tmp_path):
    out = tmp_path / "one.png"
    run_cli("run", lesa_bundle, "-p", PROMPT, "-o", out)
    with Image.open(out) as picture:
        assert picture.size == (64, 64)
        assert np.asarray(picture).std() > 5
    assert CliRunner().invoke(main, ["run", str(lesa_bundle), "-p", PROMPT, "-o", str(out)]).exit_code == 7


@pytest.mark.smoke
def test_compare_draws_one_sheet(lesa_bundle, tmp_path):
    output = run_cli("run", lesa_bundle, "-p", PROMPT, "-p", "a green cross", "-o", tmp_path / "sheet.png", "--compare")
    assert "times as fast" in output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 256
        assert sheet.height > 2 * 256


def test_several_prompts_make_numbered_files(lesa_bundle, tmp_path):
    run_cli("run", lesa_bundle, "-p", PROMPT, "-p", "a green cross", "-o", tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.png", "x-2.png"]


def test_uncached_program_equals_the_diffusers_pipeline(lesa_bundle, model, conditions):
    settings = settings_of(Bundle.open(lesa_bundle).manifest)
    with cachec.load(lesa_bundle) as loaded:
        session = loaded.session(level=UNCACHED, batch=2)
        noise = np.stack([make_noise(s, session.latent_shape[1:]) for s in (1, 2)])
        np.testing.assert_allclose(session.run(conditions, noise), model.generate(conditions, noise, settings), atol=2e-3)


def test_back_ends_and_folding_agree(lesa_bundle, unfolded_bundle, eager_bundle, conditions):
    latents = {}
    for name, path in (("ort", lesa_bundle), ("unfolded", unfolded_bundle), ("eager", eager_bundle)):
        with cachec.load(path) as loaded:
            latents[name] = loaded.denoise(conditions, [1, 2])
    scale = np.abs(latents["ort"]).max()
    for name in ("unfolded", "eager"):
        np.testing.assert_allclose(latents[name], latents["ort"], atol=1e-4 * scale)


def test_one_forecast_agrees_folded_and_unfolded_to_1e_5(lesa_bundle, unfolded_bundle, conditions):
    """Take both bundles to the end of their first forecasts: the latents then differ by the folding only."""
    latents = []
    for path in (lesa_bundle, unfolded_bundle):
        with cachec.load(path) as loaded:
            program = loaded.programs["default"]
            session = loaded.session(batch=2)
            session.begin(conditions, np.stack([make_noise(s, session.latent_shape[1:]) for s in (1, 2)]))
            gap = next(i for i, (a, b) in enumerate(pairwise(program.compute_steps)) if b > a + 1)
            for instruction in program.instructions:
                if instruction.steps == (program.compute_steps[gap + 1],):
                    break
                session.advance()
            latents.append(session.latents)
    np.testing.assert_allclose(*latents, atol=1e-5)


def test_kan_is_inside_the_unfolded_engine_and_only_there(lesa_bundle, unfolded_bundle):
    def inputs(path):
        return {spec.name for spec in Bundle.open(path).target.engines["forecast"].signature.inputs}

    assert {"sigmas", "step", "feature_0", "feature_7"} <= inputs(unfolded_bundle)
    assert {"coefficients", "bias", "features"} <= inputs(lesa_bundle)
    assert not {"sigmas", "step"} & inputs(lesa_bundle)


def test_interleaved_sessions_over_nan_equal_running_alone(lesa_bundle, conditions):
    with cachec.load(lesa_bundle) as loaded:
        sessions = [loaded.session(batch=2), loaded.session(batch=2)]
        noises = [np.stack([make_noise(s, x.latent_shape[1:]) for s in (k, k + 9)]) for k, x in enumerate(sessions)]
        alone = [loaded.session(batch=2).run(conditions, noise) for noise in noises]
        for session, noise in zip(sessions, noises, strict=True):
            session.slots["feature"][:] = np.nan
            session.begin(conditions, noise)
        while not all(session.finished for session in sessions):
            for session in sessions:
                session.advance()
        for session, expected in zip(sessions, alone, strict=True):
            np.testing.assert_array_equal(session.latents, expected)


def test_a_bundle_for_one_batch_size_refuses_others(lesa_bundle):
    with cachec.load(lesa_bundle) as loaded:
        program = loaded.programs["default"]
        fixed = replace(program, key=replace(program.key, batch=2))
        with pytest.raises(InputError, match="batches of 2"):
            Session(loaded.engines, fixed, loaded.io, batch=1)


@pytest.mark.smoke
def test_denoising_on_onnx_runtime_loads_neither_torch_nor_diffusers_nor_onnx(lesa_bundle, conditions, tmp_path):
    np.savez(tmp_path / "conditions.npz", **{name: value[:1] for name, value in conditions.items()})
    code = """
import sys
import numpy as np
import cachec
with cachec.load(sys.argv[1]) as loaded:
    latents = loaded.denoise(dict(np.load(sys.argv[2])), [3])
assert np.isfinite(latents).all()
loaded = {"torch", "diffusers", "transformers", "onnx", "onnxscript"} & set(sys.modules)
assert not loaded, loaded
"""
    arguments = [sys.executable, "-c", code, lesa_bundle, tmp_path / "conditions.npz"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


def test_bundles_name_no_path_of_this_machine(lesa_bundle, eager_bundle):
    places = [str(TINY_FLUX_DIR.parent.parent.parent).encode(), b"site-packages"]
    for file in (*lesa_bundle.rglob("*"), *eager_bundle.rglob("*")):
        if file.is_file():
            assert not any(place in file.read_bytes() for place in places), file


def test_inspect_tells_schedule_and_predictor(lesa_bundle):
    output = run_cli("inspect", lesa_bundle)
    assert "####·····#······#" in output
    assert "all hashes match" in output
    data = json.loads(run_cli("inspect", lesa_bundle, "--json"))
    assert data["manifest"]["method"]["name"] == "lesa"
    instructions = data["programs"]["default"]["instructions"]
    assert [i["op"] for i in instructions].count("compute") == 10
    assert sum(len(i["steps"]) if i["op"] == "forecast" else 1 for i in instructions) == 50
    assert "of weights left the step" in output
    assert "MB for one sample at level default: weights" in output


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_engine_files_are_refused(lesa_bundle, tmp_path, damage):
    import shutil

    copy = tmp_path / "copy.cachec"
    shutil.copytree(lesa_bundle, copy)
    weights = next(copy.glob("engines/*/weights-*.bin"))
    content = bytearray(weights.read_bytes())
    if damage == "remove":
        weights.unlink()
    else:
        content[len(content) // 2] ^= 1
        weights.write_bytes(content[:-1] if damage == "truncate" else content)
    with pytest.raises(BundleError, match={"truncate": "bytes", "flip": "SHA-256", "remove": "missing"}[damage]):
        cachec.load(copy)


def test_eval_writes_the_table_and_the_json(lesa_bundle, tmp_path):
    output = run_cli("eval", lesa_bundle, "--num", "2", "--json", tmp_path / "eval.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert list(rows) == ["uncached", "default", "taylor:1", "taylor:2", "reuse", "plain", "unipc", "diffusers"]
    fields = {"name", "compute_steps", "psnr_db", "psnr_db_min", "psnr_db_fine", "ssim", "latent_error", "seconds_loop",
              "seconds_total", "speedup_vs_uncached", "speedup_vs_eager"}  # fmt: skip
    assert all(fields <= set(row) for row in rows.values())
    assert rows["uncached"]["psnr_db"] is None
    assert rows["default"]["compute_steps"] == rows["plain"]["compute_steps"] == rows["unipc"]["compute_steps"] == 10
    assert rows["diffusers"]["latent_error"] < 1e-3
    assert rows["default"]["latent_error"] < rows["reuse"]["latent_error"]
    assert rows["diffusers"]["attribute_accuracy"] > 0.7
    assert rows["default"]["lpips"] is None or rows["default"]["lpips"] > 0
    assert len(rows["default"]["psnr_db_by_prompt"]) == 2
    assert "**default**" in output


def test_report_writes_a_page_with_pictures_and_plots(lesa_bundle, tmp_path):
    out = tmp_path / "report.html"
    output = run_cli("report", lesa_bundle, "-o", out, "--num", "1", "--pictures", "1", "--against", "lesa,ab2")
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 6  # uncached, default, lesa, ab2, diffusers, fine
    assert page.count("<svg") == 4
    assert str(tmp_path) not in page
    assert "times as fast" in output


def test_methods_without_a_fitting_predictor_are_refused(lesa_bundle):
    result = CliRunner().invoke(main, ["eval", str(lesa_bundle), "--against", "lesa:5", "--num", "1"])
    assert result.exit_code == InputError.exit_code
    assert "no lesa predictor ships for tiny-flux with 50 steps, interval 5" in result.output


def test_eval_refuses_a_model_with_other_weights(lesa_bundle, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(TINY_FLUX_DIR, other)
    weights = next((other / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = CliRunner().invoke(main, ["eval", str(lesa_bundle), "--model", str(other)])
    assert result.exit_code == InputError.exit_code
    assert "other weights" in result.output


def test_eval_of_more_prompts_than_there_are_is_refused(lesa_bundle):
    result = CliRunner().invoke(main, ["eval", str(lesa_bundle), "--num", "100000"])
    assert result.exit_code == InputError.exit_code


def test_a_method_change_leaves_the_engines_as_they_are(lesa_bundle, model, tmp_path):
    request = make_request(MODELS["tiny-flux"], method="taylor", options={"order": "2"}, budget=8)
    other = compile_bundle(model, request, tmp_path / "taylor.cachec").bundle
    for name, artifact in Bundle.open(lesa_bundle).target.engines.items():
        mine = other.manifest.files[other.target.engines[name].path]
        assert mine["sha256"] == Bundle.open(lesa_bundle).manifest.files[artifact.path]["sha256"]


def test_a_failing_compile_with_force_leaves_the_old_bundle(lesa_bundle, tmp_path, model):
    import shutil

    out = tmp_path / "out.cachec"
    shutil.copytree(lesa_bundle, out)
    before = Bundle.open(out).manifest.to_json()
    request = replace(make_request(MODELS["tiny-flux"], method="lesa", interval=7), predictor=tmp_path / "missing")
    with pytest.raises(cachec.CachecError, match="does not exist"):
        compile_bundle(model, request, out, force=True)
    assert Bundle.open(out).manifest.to_json() == before


def test_force_replaces_a_bundle_and_removes_its_files(tmp_path, model):
    out = tmp_path / "out.cachec"
    for order in (1, 2):
        request = make_request(MODELS["tiny-flux"], method="taylor", targets="eager", options={"order": str(order)})
        bundle = compile_bundle(model, request, out, force=True).bundle
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.method["options"] == Taylor(2).options()


TRAIN = ["train", "tiny-flux", "--steps", "6", "--interval", "2", "--set", "max_rounds=3", "--seed", "5"]


@pytest.fixture
def few_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(default_prompts("shapes", "train")[:8]))
    return path


def test_training_interrupted_by_a_kill_goes_on_to_the_same_result(tmp_path, few_prompts):
    straight, killed = tmp_path / "straight.safetensors", tmp_path / "killed.safetensors"
    run_cli(*TRAIN, "--prompts", few_prompts, "-o", straight)
    command = [sys.executable, "-m", "cachec", *TRAIN, "--prompts", few_prompts, "-o", killed]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed.safetensors.training" / "lesa.checkpoint").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not killed.exists():
        run_cli(*TRAIN, "--prompts", few_prompts, "-o", killed)
    first, second = load_predictor(straight), load_predictor(killed)
    assert first.facts["updates"] == second.facts["updates"]
    for name, tensor in first.tensors.items():
        np.testing.assert_allclose(tensor.numpy(), second.tensors[name].numpy(), atol=1e-5)
    assert not (tmp_path / "killed.safetensors.training").exists()


def test_unfinished_training_with_other_settings_is_not_mixed_up(tmp_path, few_prompts):
    work = tmp_path / "p.safetensors.training"
    work.mkdir()
    (work / "training.json").write_text(json.dumps({"steps": "999"}))
    arguments = [*TRAIN, "--prompts", str(few_prompts), "-o", str(tmp_path / "p.safetensors")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == InputError.exit_code
    assert "unfinished training" in result.output


def test_the_shipped_predictor_tells_how_it_was_trained():
    facts = load_predictor(next(PRETRAINED.glob("lesa-tiny-flux-*.safetensors"))).facts
    curve = json.loads(facts["curve"])
    assert curve[-1]["updates"] > 1000
    assert min(point["held_out_latent_rel_l2"] for point in curve) < curve[0]["held_out_latent_rel_l2"]
    assert {"seed", "num_prompts", "prompts_sha256", "weights_sha256", "steps", "interval"} <= set(facts)


def test_training_that_stops_improving_ends_by_itself(tmp_path, few_prompts, model, monkeypatch):
    from cachec.compiler.methods import lesa_training

    monkeypatch.setattr(lesa_training, "PATIENCE", (1, 1))
    monkeypatch.setattr(lesa_training, "ROUNDS_PER_EVALUATION", (1, 1))
    monkeypatch.setattr(lesa_training, "RATES", (0.0, 0.0))  # nothing can improve
    arguments = [a for a in TRAIN if not a.startswith(("--set", "max_rounds"))]
    run_cli(*arguments, "--prompts", few_prompts, "-o", tmp_path / "p.safetensors")
    curve = json.loads(load_predictor(tmp_path / "p.safetensors").facts["curve"])
    assert [point["phase"] for point in curve] == [0, 0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("dtype", "distance"), [("float16", 0.05), ("bfloat16", 0.1)])
def test_half_precision_follows_float32_and_leaves_the_model_as_it_is(
    tmp_path, model, eager_bundle, conditions, dtype, distance
):
    half = make_request(MODELS["tiny-flux"], method="lesa", interval=7, targets="eager", dtype=dtype, verify_passes=True)
    compile_bundle(model, half, tmp_path / "half.cachec")
    assert str(next(model.transformer.parameters()).dtype) == "torch.float32"
    latents = []
    for path in (eager_bundle, tmp_path / "half.cachec"):
        with cachec.load(path) as loaded:
            latents.append(loaded.denoise(conditions, [1, 2]))
    assert np.linalg.norm(latents[1] - latents[0]) < distance * np.linalg.norm(latents[0])
    assert Bundle.open(tmp_path / "half.cachec").manifest.settings["dtype"] == dtype
