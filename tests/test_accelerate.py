"""``cachec.accelerate`` from end to end, on tiny-flux with one block of each kind. What it leaves: ``test_drop_in.py``."""

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline

import cachec
from cachec.compiler.models import TINY_FLUX_DIR
from cachec.runtime.abi import COMPUTE, FEATURE
from cachec.runtime.errors import InputError

STEPS = 12
CALL = {
    "prompt": ["a laughing face with short blue hair in a red tee", "an angry person with no hair in a white jacket"],
    "height": 128,
    "width": 128,
    "num_inference_steps": STEPS,
    "guidance_scale": 3.5,
    "max_sequence_length": 24,
    "output_type": "latent",
}
SOME = "0,1,2,4,6,9"


def load():
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    del pipeline.transformer.transformer_blocks[1:], pipeline.transformer.single_transformer_blocks[1:]
    return pipeline


def run(pipeline, **changes):
    return pipeline(**{**CALL, **changes}, generator=torch.Generator().manual_seed(0)).images.float().numpy()


def relative_error(latents, reference):
    return np.linalg.norm(latents - reference) / np.linalg.norm(reference)


@pytest.fixture(scope="module")
def uncached():
    return run(load())


@pytest.fixture(scope="module")
def accelerated():
    """Made where tensors would be of another kind, which must not show."""
    pipeline = load()
    with torch.inference_mode():
        torch.set_default_dtype(torch.float64)
        try:
            return cachec.accelerate(pipeline, method="taylor", steps=STEPS, schedule=SOME, compiled=False)
        finally:
            torch.set_default_dtype(torch.float32)


def test_forecasts_come_near_and_calls_are_repeatable(accelerated, uncached):
    first = run(accelerated)
    assert 1e-4 < relative_error(first, uncached) < 0.5  # what is left of the model is not what was trained
    np.testing.assert_array_equal(run(accelerated), first)
    assert accelerated.transformer.program.compute_steps == (0, 1, 2, 4, 6, 9)


@pytest.mark.slow
def test_a_code_is_in_the_graphs_of_a_pipeline_in_memory_too(uncached):
    pipeline = cachec.accelerate(load(), method="freqca", steps=STEPS, schedule=SOME, compiled=False, height=128, width=128)
    assert 1e-4 < relative_error(run(pipeline), uncached) < 0.5
    assert pipeline.transformer.program.coefficients.shape[1] == 2


def test_a_call_that_was_dropped_halfway_leaves_nothing_behind(accelerated):
    def stop(pipeline, step, timestep, given):
        if step == 3:
            raise KeyboardInterrupt
        return given

    whole = run(accelerated)
    with pytest.raises(KeyboardInterrupt):
        run(accelerated, prompt=["another", "two"], callback_on_step_end=stop)
    np.testing.assert_array_equal(run(accelerated), whole)


@pytest.mark.slow
def test_bfloat16_pipelines_keep_their_weights_and_round_less(uncached):
    uncached_bfloat16 = run(load().to(torch.bfloat16))
    pipeline = load().to(torch.bfloat16)
    given = {id(parameter) for parameter in pipeline.transformer.parameters()}
    given_here = {"method": "taylor", "steps": STEPS, "schedule": "0,1,2,3,4,5,6,7,8,9,10", "compiled": False}
    cachec.accelerate(pipeline, **given_here)
    (engines,) = pipeline.transformer._compiled.forms[0].open.args[0].values()  # of the one length of texts
    weights = dict(engines[COMPUTE]._native.named_parameters())
    assert {tensor.dtype for tensor in weights.values() if id(tensor) in given} == {torch.bfloat16}
    widened = {name for name, tensor in weights.items() if id(tensor) not in given}
    assert widened
    assert all(".norm_" in name and weights[name].dtype == torch.float32 for name in widened)
    got = run(pipeline)
    exact = run(cachec.accelerate(load(), **given_here))  # with the same forecast
    assert relative_error(got, exact) < relative_error(uncached_bfloat16, uncached)  # the pipeline rounds its timesteps, too
    (stepper,) = pipeline.transformer._runs.steppers.values()
    assert stepper.slots[FEATURE].dtype == torch.bfloat16


def test_a_failing_request_leaves_the_pipeline_as_it_was():
    pipeline = load()
    original = pipeline.transformer
    with pytest.raises(InputError):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS, schedule="1,2")
    assert pipeline.transformer is original


def test_a_pipeline_is_accelerated_once(accelerated):
    with pytest.raises(InputError, match="this pipeline is accelerated already"):
        cachec.accelerate(accelerated, method="taylor", steps=STEPS)


def test_what_would_be_baked_in_or_moved_away_is_refused_before_anything_slow():
    pipeline = load()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(InputError, match="has a cache of diffusers: call pipe.transformer.disable_cache"):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS)
    pipeline.transformer.disable_cache()
    pipeline.transformer.proj_out._hf_hook = object()
    with pytest.raises(InputError, match="moved by offload hooks"):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS)


def test_only_known_pipelines_are_taken():
    with pytest.raises(InputError, match="the pipeline is a dict; cachec knows .*FluxPipeline"):
        cachec.accelerate({})


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "float16"}])
def test_another_device_or_precision_is_not_made(options):
    pipeline = load()
    with pytest.raises(
        InputError, match=f"{next(iter(options))} cannot be given: the pipeline's own are taken; move it first with pipe.to"
    ):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS, **options)
    assert isinstance(pipeline.transformer, torch.nn.Module)
