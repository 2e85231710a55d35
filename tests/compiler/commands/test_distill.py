"""``cachec distill`` on small pipelines: into a directory that compiles, and what is refused before anything slow."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from cachec.cli import main
from cachec.compiler.commands.distill import distill_to_directory
from cachec.compiler.distillation import training
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.compiler.models.flow_maps import second_time
from cachec.engines import open_bundle
from cachec.runtime.errors import InputError, OutputError
from cachec.runtime.program import UNCACHED

SIZE = {"size": "48x32", "text_tokens": "24", "teacher_steps": 3}
LITTLE = {**SIZE, "distilled_steps": 2, "restrict": 1.0, "updates": 2, "distilled_batch": 1}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """As few as can be divided: some to train on, some to stop by, some to measure on."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{number} rings" for number in range(10)))
    return path


def distil(source, out, prompts, **changes):
    return dict(distill_to_directory(str(source), out, force=False, **{**LITTLE, "prompts": prompts, **changes}))


@pytest.mark.slow
def test_a_directory_is_made_that_says_what_it_is(saved_family, prompts, tmp_path):
    rows = distil(saved_family("flux"), tmp_path / "few", prompts, guidance=2.5)
    assert (rows["steps"], rows["guidance"]) == ("2", "2.5")
    assert [path.name for path in tmp_path.iterdir()] == ["few"]
    spec = find_model(str(tmp_path / "few"))
    assert (spec.steps, spec.guidance, spec.width, spec.height, spec.text_tokens) == (2, 2.5, 48, 32, 24)
    model = load_model(spec)
    assert second_time(model.transformer) == "target_timestep"
    facts = json.loads((tmp_path / "few" / "distilled.json").read_text())
    assert [point["update"] for point in facts["curve"]] == [0, 1, 2]
    assert facts["held_out_rel_l2"] == min(point["held_out"] for point in facts["curve"])
    assert (facts["teacher_steps"], facts["restrict"], facts["num_prompts"]) == (3, 1.0, facts["num_prompts"])
    assert '"/' not in (tmp_path / "few" / "transformer" / "config.json").read_text()  # no folder of this machine
    with pytest.raises(InputError, match="told a second time already"):
        distil(tmp_path / "few", tmp_path / "fewer", prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "second"), [("qwen-image", "target_timestep"), ("hunyuan-video-1.5", "timestep_r")])
def test_true_guidance_is_distilled_too(saved_family, prompts, tmp_path, name, second):
    sizes = {"frames": 5, "text_tokens": "64"} if name.startswith("hunyuan") else {}
    rows = distil(saved_family(name), tmp_path / "few", prompts, **sizes)
    assert rows["guidance"] == "1.0"  # one branch
    assert second_time(load_model(find_model(str(tmp_path / "few"))).transformer) == second


@pytest.mark.slow
def test_what_is_made_compiles_and_a_predictor_is_trained_on_it(saved_family, prompts, tmp_path):
    few, out = tmp_path / "few", tmp_path / "few.cachec"
    distil(saved_family("flux"), few, prompts, distilled_steps=4, restrict=0.5)
    told, predictor = ["--interval", "2", "--method", "disca"], str(tmp_path / "p.safetensors")
    little = ["--set", "updates=2", "--set", "adversarial=2", "--prompts", str(prompts)]
    assert CliRunner().invoke(main, ["train", str(few), *told, *little, "-o", predictor]).exit_code == 0
    assert CliRunner().invoke(main, ["compile", str(few), *told, "--predictor", predictor, "-o", str(out)]).exit_code == 0
    model = load_model(find_model(str(few)))
    with open_bundle(out) as bundle:
        settings = settings_of(bundle.bundle.manifest)
        inputs = {name: value.numpy() for name, value in model.example_inputs(settings).items()}
        noise, conditions = inputs.pop(model.io.latents), {name: inputs[name] for name in model.io.conditions}
        for level, program in bundle.programs.items():
            np.testing.assert_array_equal(program.target_timesteps, [*program.timesteps[1:], 0])
            made = bundle.session(batch=2, level=level).run(conditions, noise)
            near = np.abs(made - model.generate(conditions, noise, settings)).max()
            assert (near < 1e-4) == (level == UNCACHED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restrict": 0.0}, "restrict is 0.0; it must be above 0"),
        ({"restrict": 1.01}, "restrict is 1.01; it must be above 0, and 1 at most"),
        ({"distilled_steps": 0}, "steps is 0; it must be at least 1"),
        ({"teacher_steps": 0}, "steps is 0; it must be at least 1"),
        ({"size": "48x32,32x48"}, "only compile takes several"),
        ({"derivative": "dual"}, "unknown derivative 'dual'"),
        ({"size": "50x32"}, "width is 50"),
    ],
)
def test_what_is_out_of_range_is_refused(saved_family, prompts, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(training, "Distiller", None)
    with pytest.raises(InputError, match=re.escape(message)):
        distil(saved_family("flux"), tmp_path / "few", prompts, **changes)
    assert not list(tmp_path.iterdir())


def test_models_without_flow_matching_are_refused_by_name(saved_family, prompts, tmp_path):
    with pytest.raises(InputError, match="a PixArtTransformer2DModel has no second time input that is known"):
        distil(saved_family("pixart-sigma"), tmp_path / "few", prompts)


def test_nothing_is_replaced_that_is_none(saved_family, prompts, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="no distilled model"):
        distil(saved_family("flux"), tmp_path / "few", prompts)


def test_long_steps_are_warned_of(saved_family, prompts, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("cachec.compiler.calibration.runs.encode_ahead", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        distil(saved_family("flux"), tmp_path / "few", prompts, restrict=0.2)
    assert re.search(r"the longest of 2 steps is 0\.\d+ of the noise, and the student learns intervals up to 0\.2", caplog.text)
