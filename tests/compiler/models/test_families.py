"""Families: a directory becomes graphs that compute what the transformer does on what its pipeline hands over."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.capture import joined
from cachec.compiler.graphs.prepare import compute_only, engine, prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models import FAMILIES as KINDS
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import Settings
from cachec.compiler.models.from_pictures import FromPictures
from cachec.compiler.models.named import MODELS
from cachec.compiler.tables.lower import lower_uncached
from cachec.runtime.abi import ADVANCE, COMPUTE, EXPERT, FORECAST, PROLOGUE, VELOCITY
from cachec.runtime.errors import InputError, ModelUnavailableError
from cachec.runtime.program import ProgramKey, hash_sigmas
from tests.families import FAMILIES, NEGATIVE, PROMPT
from tests.family_settings import SOME, settings_for
from tests.outside import SOURCE

WITHOUT_NEGATIVES = ("dit", "flux-2-klein")  # their pipelines' negative branch is of nothing
TOLERANCE = 1e-5  # relative, of the largest difference


@pytest.fixture(scope="module", params=[f for f in FAMILIES if f.name in SOME], ids=lambda family: family.name)
def case(request, saved_family):
    family = request.param
    directory = saved_family(family.name)
    model = load_model(find_model(str(directory)))
    for name, stand_in in family.stand_ins(directory).items():
        setattr(model.pipeline, name, stand_in)
    return family, model


def prompts_for(family, directory):
    """Two prompts, as the family takes them."""
    if family.name == "dit":
        return ["7", "8"]
    if "image" not in family.call:
        return [PROMPT, "a green square"]
    family.call["image"].save(directory / "picture.png")
    return [f"[{directory / 'picture.png'}] {text}" for text in (PROMPT, "a green square")]


def own_call(family, model, settings, prompts, negatives, noise):
    """What a user of the pipeline would call it with."""
    texts = [prompt.rpartition("] ")[2] for prompt in prompts]
    call = {**family.call, "prompt": texts, "latents": noise, "num_inference_steps": settings.steps}
    call |= {} if negatives is None else {"negative_prompt": negatives}
    if "image" in call and settings.frames == 1:  # videos of one call begin with one picture
        call["image"] = [call["image"]] * len(prompts)
    return {**call, model.SCALE: settings.true_cfg_scale, model.EMBEDDED or model.SCALE: settings.guidance}


def own_loop(family, pipeline, call):
    """Latents of the untouched pipeline, called as its users do."""
    kept = {}

    def keep(_pipe, _step, _timestep, given):
        kept.update(given)
        return {}

    klein = family.name == "flux-2-klein"  # which unpacks its latents even where no picture is wanted
    found = getattr(pipeline(**call, **({"callback_on_step_end": keep} if klein else {})), family.output)
    return torch.as_tensor(kept["latents"] if klein else found).float().numpy()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_compute_graph_is_the_transformer_on_what_the_pipeline_hands_over(case, batch):
    family, model = case
    settings, io = settings_for(family), model.io
    graphs = prepare(model, settings)
    compute = Values(torch.device("cpu")).module(graphs.modules[COMPUTE])
    inputs = model.example_inputs(settings, batch=batch)
    given = model.observed(settings, batch=batch).first
    with torch.no_grad():
        found = compute(**inputs)[VELOCITY]
        wanted = model.transformer(**{**given, io.timestep: inputs[io.timestep], "return_dict": False})[0]
    state = inputs[io.latents]
    wanted = (
        wanted.narrow(io.axis, 0, state.shape[io.axis])
        if isinstance(wanted, torch.Tensor)
        else model.state({io.latents: wanted})
    )
    assert found.shape == wanted.shape == state.shape
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert FORECAST in graphs.modules
    if model.capturable(model.transformer) is model.transformer:
        assert joined(inputs, io)[io.latents].shape == given[io.latents].shape


def test_the_runs_are_those_of_the_pipeline(case, tmp_path):
    """Conditions of prompts, timesteps and noise levels, and the baseline: all as the pipeline has them."""
    family, model = case
    settings = settings_for(family)
    prompts = prompts_for(family, tmp_path)
    guided, names = model.is_guided(settings), model.conditions(settings)
    negatives = [NEGATIVE, "blurred and dim"] if guided and family.name not in WITHOUT_NEGATIVES else None
    conditions = model.encode(prompts, settings, names, negatives)
    assert all(len(value) == 2 for value in conditions.values())
    examples = model.example_inputs(settings)
    for name in model.io.conditions:
        assert conditions[name].shape == tuple(examples[name].shape)
        assert conditions[name].dtype == examples[name].numpy().dtype
    sampling = model.sampling(settings)
    assert (len(sampling.sigmas), sampling.num_steps) == (settings.steps + 1, settings.steps)
    assert (np.diff(sampling.sigmas) < 0).all()
    noise = examples[model.io.latents].numpy()
    made = model.generate(conditions, noise, settings)
    assert made.shape == noise.shape
    frames = (settings.frames,) if settings.frames > 1 else ()
    assert model.decode(made, settings).shape == (2, *frames, settings.height, settings.width, 3)
    if family.name not in ("dit", "qwen-image-edit"):  # no noise goes in, no latents come out; one picture at a time
        call = own_call(family, model, settings, prompts, negatives, model.handed(torch.from_numpy(noise), settings))
        pipeline, call = model.staged(call)
        np.testing.assert_allclose(made, own_loop(family, pipeline, call), atol=1e-4)
    key = ProgramKey(settings.steps, hash_sigmas(sampling.sigmas), {}, guided=model.is_guided(settings))
    evaluator = GraphEvaluator(prepare(model, settings), model.io)
    np.testing.assert_allclose(evaluator.play(lower_uncached(key, sampling), noise, conditions), made, atol=1e-4)


def test_its_graphs_become_those_of_engines(case):
    family, model = case
    settings = settings_for(family)
    made = engine(compute_only(prepare(model, settings)), model.io, carries=True)
    assert {PROLOGUE, COMPUTE, ADVANCE} <= made.modules.keys()
    assert (EXPERT in made.modules) == (model.expert is not None)


def test_a_thin_twin_has_the_same_inputs(case):
    _, model = case
    twin, small = model.thin_twin(settings_for(case[0]))
    assert twin.io == model.io
    assert twin.example_inputs(small).keys() == model.example_inputs(settings_for(case[0])).keys()


def test_pictures_become_the_latents_of_the_twin_that_takes_them(case):
    family, model = case
    if not isinstance(model, FromPictures):
        return
    settings = settings_for(family)
    assert model.mixes(settings)
    pictures = torch.rand(2, settings.height, settings.width, 3, generator=torch.Generator().manual_seed(1))
    wanted = model.encode_pictures(pictures.numpy(), settings)
    assert wanted.shape == tuple(model.example_inputs(settings)[model.io.latents].shape)
    with torch.no_grad():
        np.testing.assert_allclose(model.encoded(pictures, settings).numpy(), wanted, atol=1e-5)


def test_a_sampler_that_adds_noise_otherwise_takes_no_pictures(saved_family):
    model = load_model(find_model(str(saved_family("flux"))))
    settings = settings_for(next(family for family in FAMILIES if family.name == "flux"))
    model.scheduled = lambda settings: diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    assert not model.mixes(settings)


def test_sizes_that_are_none_of_the_models_are_refused(case):
    family, model = case
    settings = settings_for(family)
    with pytest.raises(InputError, match=r"(height is 37|48x37 is asked for|64x37 is asked for)"):
        model.example_inputs(replace(settings, height=37))
    with pytest.raises(InputError, match="frames"):
        model.example_inputs(replace(settings, frames=6))


def test_a_negative_prompt_is_refused_where_there_is_no_guidance(case):
    family, model = case
    if model.io.guidance is None:
        with pytest.raises(InputError, match="has no negative prompt"):
            model.encode([PROMPT], settings_for(family), [], [NEGATIVE])


@pytest.mark.parametrize("name", MODELS)
def test_defaults_of_named_models_are_in_range(name):
    spec = MODELS[name]
    Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, spec.steps, "bfloat16", spec.frames)


def test_a_directory_that_lacks_a_component_is_named(saved_family, tmp_path):
    for path in saved_family("pixart-sigma").iterdir():
        if path.name != "text_encoder":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelUnavailableError, match=r"is incomplete: .*/text_encoder is missing\. Download"):
        load_model(find_model(str(tmp_path)))


def test_classes_have_numbers_and_names(saved_family):
    model = load_model(find_model(str(saved_family("dit"))))
    model.pipeline.labels = {"white shark": 2, "tench": 0}
    settings = settings_for(next(family for family in FAMILIES if family.name == "dit"))
    assert model.text([" white shark ", "7", ""], settings) == {"class_labels": [2, 7, 1000]}
    with pytest.raises(InputError, match="unknown class 'white shrak'. Did you mean 'white shark'"):
        model.text(["white shrak"], settings)


def test_the_family_from_outside_is_that_of_its_package_and_shown_whole(saved_family):
    assert KINDS["AuraFlowPipeline"].__module__ == "cachec_auraflow"
    shown = (SOURCE.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file in ("cachec_auraflow.py", "pyproject.toml"):
        assert (SOURCE / file).read_text(encoding="utf-8") in shown
