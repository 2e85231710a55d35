"""Models that are told a second time: their transformers, on disk, compiled, and run by their own pipelines."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.distilled import DISTILLED, write_distilled
from cachec.compiler.models.flow_maps import make_flow_map, named_in_index, second_time
from cachec.compiler.tables.lower import lower, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import TARGET_TIMESTEP
from cachec.runtime.errors import InputError, ModelUnavailableError, OutputError
from cachec.runtime.program import ProgramKey, hash_sigmas
from tests.families import FAMILIES, randomise
from tests.family_settings import settings_for

TOLD_TWICE = ("flux", "hunyuan-video", "hunyuan-video-1.5", "qwen-image", "sd3")
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan-video", "qwen-image", "sd3")]
FACTS = {"steps": 3, "guidance": 1.0, "height": 32, "width": 48, "frames": 1, "text_tokens": 24, "prompts": "general"}


def of(name):
    family = next(family for family in FAMILIES if family.name == name)
    return family, replace(settings_for(family), true_cfg_scale=1.0)


@pytest.fixture(scope="module")
def distilled(saved_family, tmp_path_factory):
    """``distilled(name)``: a small pipeline whose transformer is told a second time, all weights random."""
    made = {}

    def make(name):
        if name not in made:
            source = saved_family(name)
            student = randomise(make_flow_map(load_model(find_model(str(source))).transformer), 7)
            out = tmp_path_factory.mktemp("distilled") / name
            write_distilled(source, out, student, named_in_index(student), FACTS, force=False)
            made[name] = out
        return made[name]

    return make


@pytest.mark.parametrize("name", TOLD_TWICE)
@torch.no_grad()
def test_untrained_it_gives_what_its_teacher_does(name, saved_family):
    model, (_, settings) = load_model(find_model(str(saved_family(name)))), of(name)
    given = {**model.observed(settings).first, "return_dict": False}
    student = make_flow_map(model.transformer)
    second = {str(second_time(student)): given[model.io.timestep] / 2}
    torch.testing.assert_close(student(**given, **second)[0], model.transformer(**given)[0])


@pytest.mark.parametrize("name", ["flux", "hunyuan-video-1.5", *SLOWER])
def test_a_distilled_pipeline_runs_as_a_plain_loop_does(name, distilled):
    """The pipeline's own run, the uncached Program on the graphs, and the transformer called with both times."""
    model, (_, settings) = load_model(find_model(str(distilled(name)))), of(name)
    sampling, io = model.sampling(settings), model.io
    np.testing.assert_array_equal(sampling.targets, [*sampling.timesteps[1:], 0])
    inputs = model.example_inputs(settings)
    noise, guided = inputs[io.latents].numpy(), model.is_guided(settings)
    conditions = {key: inputs[key].numpy() for key in io.conditions}
    program = lower_uncached(ProgramKey(settings.steps, hash_sigmas(sampling.sigmas), {}), sampling)
    made = GraphEvaluator(prepare(model, settings), io).play(program, noise, conditions)
    np.testing.assert_allclose(plain_loop(model, settings, noise), made, atol=1e-4)
    reused = Reuse().table(Schedule(settings.steps, (0, 2)), sampling.sigmas, None)
    cached = GraphEvaluator(prepare(model, settings), io).play(lower(reused, program.key, sampling), noise, conditions)
    np.testing.assert_allclose(plain_loop(model, settings, noise, (0, 2)), cached, atol=1e-4)
    assert np.abs(cached - made).max() > 1e-3
    if not guided:
        np.testing.assert_allclose(model.generate(conditions, noise, settings), made, atol=1e-4)
    told_itself = replace(sampling, targets=sampling.timesteps)
    other = GraphEvaluator(prepare(model, settings), io).play(lower_uncached(program.key, told_itself), noise, conditions)
    assert np.abs(other - made).max() > 1e-3  # it listens


@torch.no_grad()
def plain_loop(model, settings, noise, computed=None):
    """The transformer called with both times; at steps that are not ``computed`` its last block gives what it gave before."""
    io, sampling, kept = model.io, model.sampling(settings), []

    def keep(_block, _given, made):
        if computed is None or step in computed:
            kept[:] = [made]
        return kept[0]

    handle = model.transformer.get_submodule(model.block).register_forward_hook(keep)
    given, x = model.observed(settings).first, torch.from_numpy(noise)
    second, empty = second_time(model.transformer), given[io.latents][:, x.shape[1] :]  # HunyuanVideo-1.5 has more channels
    for step in range(settings.steps):
        times = {io.timestep: sampling.timesteps, second: sampling.targets}
        told = {name: torch.full((len(x),), float(values[step])) for name, values in times.items()}
        whole = torch.cat([x, empty], 1)
        velocity = model.transformer(**{**given, **told, io.latents: whole, "return_dict": False})[0]
        x = x + float(sampling.sigmas[step + 1] - sampling.sigmas[step]) * velocity
    handle.remove()
    return x.numpy()


@pytest.mark.slow
def test_guided_pipelines_are_told_on_both_branches(distilled):
    model, (_, settings) = load_model(find_model(str(distilled("qwen-image")))), of("qwen-image")
    conditions = model.encode(["a ring", "a cross"], settings, model.conditions(settings))
    noise = model.example_inputs(settings)[model.io.latents].numpy()
    sampling = model.sampling(settings)
    program = lower_uncached(ProgramKey(settings.steps, hash_sigmas(sampling.sigmas), {}, guided=True), sampling)
    made = GraphEvaluator(prepare(model, settings), model.io).play(program, noise, conditions)
    np.testing.assert_allclose(model.generate(conditions, noise, settings), made, atol=1e-4)


def test_its_defaults_are_those_that_it_was_distilled_for(distilled):
    spec = find_model(str(distilled("flux")))
    assert (spec.steps, spec.guidance, spec.height, spec.width, spec.text_tokens) == (3, 1.0, 32, 48, 24)


def test_diffusers_itself_loads_it_and_says_what_is_missing(distilled):
    pipeline = diffusers.FluxPipeline.from_pretrained(distilled("flux"))
    assert type(pipeline.transformer).__name__ == "FluxFlowMap"
    given = {"hidden_states": torch.zeros(1, 6, 64), "timestep": torch.ones(1)}
    with pytest.raises(InputError, match=f"FluxFlowMap was told one time, and needs a second.*{TARGET_TIMESTEP}"):
        pipeline.transformer(**given)


def spoiled(source, out, change):
    shutil.copytree(source, out)
    change(out)
    return out


def one_time(out):
    index = json.loads((out / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (out / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_time, r"time_text_embed\.timestep_embedder\.second.* is not the model's"),
        (lambda out: (out / DISTILLED).write_text("{"), "distilled.json is damaged"),
        (lambda out: (out / DISTILLED).write_text("{}"), r"distilled.json is damaged \(KeyError\('steps'\)\)"),
    ],
    ids=["class", "cut off", "empty"],
)
def test_a_damaged_one_is_refused(distilled, tmp_path, change, message):
    out = spoiled(distilled("flux"), tmp_path / "spoiled", change)
    with pytest.raises(ModelUnavailableError, match=message):
        load_model(find_model(str(out)))


def test_a_distilled_file_without_its_second_time_is_refused(saved_family, tmp_path):
    out = spoiled(saved_family("flux"), tmp_path / "m", lambda out: (out / DISTILLED).write_text(json.dumps(FACTS)))
    with pytest.raises(ModelUnavailableError, match="its transformer, a FluxTransformer2DModel, has no second time input"):
        load_model(find_model(str(out)))


def test_what_has_no_second_time_is_refused(saved_family, distilled):
    with pytest.raises(InputError, match="a PixArtTransformer2DModel has no second time input that is known; those of Flux"):
        make_flow_map(load_model(find_model(str(saved_family("pixart-sigma")))).transformer)
    with pytest.raises(InputError, match="told a second time already"):
        make_flow_map(load_model(find_model(str(distilled("flux")))).transformer)


def test_nothing_else_is_replaced(saved_family, distilled, tmp_path):
    student, source = load_model(find_model(str(distilled("flux")))).transformer, saved_family("flux")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="no distilled model, so it will not be replaced"):
        write_distilled(source, tmp_path / "mine", student, named_in_index(student), FACTS, force=True)
    write_distilled(source, tmp_path / "out", student, named_in_index(student), FACTS, force=False)
    with pytest.raises(OutputError, match="is a distilled model already: pass --force"):
        write_distilled(source, tmp_path / "out", student, named_in_index(student), FACTS, force=False)
    write_distilled(source, tmp_path / "out", student, named_in_index(student), {**FACTS, "steps": 5}, force=True)
    assert find_model(str(tmp_path / "out")).steps == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
