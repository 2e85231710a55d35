"""A bundle in a pipeline's transformer's place: a random FLUX pipeline, compiled from disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from families import FAMILIES
from toy_lesa import random_branches

import cachec
from cachec.compiler.calibration.runs import encode_prompts
from cachec.compiler.methods.parameters import Parameters, predictor_bytes
from cachec.compiler.methods.training import training_facts
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.samples import difference, sample
from cachec.compiler.options import read_options
from cachec.compiler.request import check_wish
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.noise import make_noise

FLUX, QWEN = (next(family for family in FAMILIES if family.name == name) for name in ("flux", "qwen-image"))
STEPS = FLUX.call["num_inference_steps"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pipeline's directory, and a bundle of it."""
    root = tmp_path_factory.mktemp("flux")
    FLUX.make().save_pretrained(root / "model")
    sizes = {"height": FLUX.call["height"], "width": FLUX.call["width"], "text_tokens": FLUX.call["max_sequence_length"]}
    options = {"method": "reuse", "schedule": "0,2", "steps": STEPS, "targets": "eager"}
    return root / "model", cachec.compile_model(str(root / "model"), root / "b.cachec", **options, **sizes)


@pytest.fixture
def plain(made):
    return FLUX.load(made[0])


@pytest.fixture
def loaded(made):
    return cachec.load(made[1])


def standing(pipeline, loaded, **options):
    pipeline.transformer = loaded.as_transformer(pipeline.transformer, pipeline=pipeline, **options)
    return pipeline


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_the_pipeline_runs_on_the_bundle(made, plain, loaded):
    wanted = FLUX.run(plain)
    assert error(FLUX.run(standing(FLUX.load(made[0]), loaded, level="uncached")), wanted) < 1e-5
    pipeline = standing(plain, loaded)
    got = FLUX.run(pipeline)
    assert 1e-3 < error(got, wanted) < 0.5
    assert torch.equal(FLUX.run(pipeline), got)
    assert pipeline.transformer.program.compute_steps == (0, 2)


def test_other_steps_and_pictures_to_begin_with_are_computed(made, plain, loaded):
    pipeline = FLUX.load(made[0])
    pipeline.transformer = loaded.as_transformer(pipeline.transformer)  # its scheduler is not looked at
    assert error(FLUX.run(pipeline, num_inference_steps=5), FLUX.run(plain, num_inference_steps=5)) < 1e-5
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    got, wanted = (
        FLUX.run(FluxImg2ImgPipeline(**one.components), image=image, strength=0.4, num_inference_steps=STEPS)
        for one in (pipeline, plain)
    )
    assert error(got, wanted) < 1e-5


def with_adapter(pipeline):
    class Adapter(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    pipeline.transformer.proj_out = Adapter(pipeline.transformer.proj_out)


def other_values(pipeline):
    pipeline.transformer.proj_out.bias.data += 1


def other_settings(pipeline):
    pipeline.scheduler.register_to_config(shift=1.0)


@pytest.mark.parametrize(("change", "message"), [
    (with_adapter, "proj_out.base_layer.bias is loaded, an adapter. Take the adapter off"),
    (other_values, "not the one that the bundle was compiled from, .*: proj_out.bias has other values"),
    (lambda pipeline: pipeline.to(torch.bfloat16), "the transformer is bfloat16, the bundle float32"),
    (other_settings, "the scheduler has another shift, as the bundle was compiled for"),
    (lambda pipeline: pipeline.scheduler.register_to_config(stochastic_sampling=True), "stochastic_sampling"),
])  # fmt: skip
def test_a_pipeline_of_something_else_is_refused(plain, loaded, change, message):
    change(plain)
    with pytest.raises(InputError, match=message):
        standing(plain, loaded)


def test_bundles_that_do_not_know_their_pipeline_are_refused(plain, loaded):
    old = replace(loaded, manifest=replace(loaded.manifest, facts={}))
    with pytest.raises(BundleError, match="does not say what its pipeline hands its transformer: compile it again"):
        standing(plain, old)
    with pytest.raises(InputError, match=r"only a bundle that cachec.load opened"):
        replace(loaded, drop_in=None).as_transformer(plain.transformer)


def test_samples_are_compared_in_the_type_that_is_held():
    values = torch.randn(40, 30)
    assert difference({"w": sample(values)}, {"w": sample(values.bfloat16())}) is None
    assert difference({"w": sample(values)}, {"w": sample(values + 1e-3)}) == "w has other values"
    assert difference({"w": sample(values)}, {}) == "w is not there"


# --- branches of guidance that are forecast by numbers of their own


def test_calls_of_each_branch_get_the_forecasts_of_that_branch(saved_family, tmp_path):
    directory, steps = saved_family("qwen-image"), 6
    sizes = {name: QWEN.call[name] for name in ("height", "width")}
    options = {"method": "lesa", "schedule": "0,1,2,4", "steps": steps, "text_tokens": 64, "guidance": 4.0, **sizes}
    request = check_wish(find_model(str(directory)), read_options(options))
    model = load_model(find_model(str(directory)))
    facts = training_facts(model, request.method, request.schedule, request.settings)
    arrays = {name: value.numpy() for name, value in random_branches(steps).state_dict().items()}  # far from each other
    file = tmp_path / "lesa.safetensors"
    file.write_bytes(predictor_bytes(Parameters(arrays, facts, "a test")))
    loaded = cachec.load(cachec.compile_model(str(directory), tmp_path / "b", predictor=file, targets="eager", **options))
    session, program = loaded.session(), loaded.programs["default"]
    assert np.abs(np.diff(program.coefficients, axis=1)).max() > 0.01
    noise = make_noise(3, session.latent_shape[1:])[None]
    wanted = session.run(encode_prompts(model, [QWEN.call["prompt"]], request.settings), noise)
    call = {"num_inference_steps": steps, "max_sequence_length": 64, "negative_prompt": "", "true_cfg_scale": 4.0}
    got = QWEN.run(standing(QWEN.load(directory), loaded), **call, latents=torch.from_numpy(noise))
    assert error(got, torch.from_numpy(wanted)) < 1e-5
