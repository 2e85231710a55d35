"""A pipeline in memory: what ``cachec.accelerate`` leaves of it, and what it refuses."""

import numpy as np
import pytest
import torch

import cachec
from cachec.compiler.models import TINY_FLUX_DIR
from cachec.runtime.errors import InputError

STEPS = 12
CALL = {
    "prompt": ["a large red striped circle at the left on a dark background", "a blue ring above a green square"],
    "height": 64,
    "width": 64,
    "num_inference_steps": STEPS,
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def load():
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(TINY_FLUX_DIR, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, **changes):
    return pipeline(**{**CALL, **changes}, generator=torch.Generator().manual_seed(0)).images.float().numpy()


@pytest.fixture(scope="module")
def uncached():
    return run(load())


@pytest.fixture(scope="module")
def accelerated():
    return cachec.accelerate(load(), method="taylor", steps=STEPS, schedule="0,1,2,5,8", compiled=False)


def relative_error(latents, reference):
    return np.linalg.norm(latents - reference) / np.linalg.norm(reference)


def test_computing_every_step_gives_the_pipelines_own_latents(uncached):
    everything = ",".join(map(str, range(STEPS)))
    pipeline = cachec.accelerate(
        load(), method="adams", steps=STEPS, schedule=everything, options={"order": "1"}, compiled=False
    )
    np.testing.assert_allclose(run(pipeline), uncached, atol=2e-4, rtol=1e-4)


def test_forecasts_come_near_and_calls_are_repeatable(accelerated, uncached):
    first = run(accelerated)
    assert 1e-4 < relative_error(first, uncached) < 0.2
    np.testing.assert_array_equal(run(accelerated), first)
    assert accelerated.transformer.program.compute_steps == (0, 1, 2, 5, 8)


def test_a_call_that_was_dropped_halfway_leaves_nothing_behind(accelerated):
    def stop(pipeline, step, timestep, given):
        if step == 3:
            raise KeyboardInterrupt
        return given

    whole = run(accelerated)
    with pytest.raises(KeyboardInterrupt):
        run(accelerated, prompt=["another", "two"], callback_on_step_end=stop)
    np.testing.assert_array_equal(run(accelerated), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 20}, "num_inference_steps is 20; this pipeline was accelerated for 12 steps"),
        ({"height": 128}, r"'hidden_states' has shape \[2, 128, 64\], expected \[2, 64, 64\]"),
        ({"max_sequence_length": 32}, r"'encoder_hidden_states' has shape \[2, 32, 64\], expected \[2, 16, 64\]"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "does not take joint_attention_kwargs: take it off the call"),
    ],
)
def test_another_run_than_the_one_compiled_is_refused(accelerated, changes, message):
    with pytest.raises(InputError, match=message):
        run(accelerated, **changes)


def test_the_transformers_own_attributes_are_still_there(accelerated):
    assert accelerated.transformer.config.in_channels == 64
    assert accelerated.transformer.dtype == torch.float32


def test_a_failing_request_leaves_the_pipeline_as_it_was():
    pipeline = load()
    original = pipeline.transformer
    with pytest.raises(InputError):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS, schedule="1,2")
    assert pipeline.transformer is original


def test_a_pipeline_is_accelerated_once(accelerated):
    with pytest.raises(InputError, match="this pipeline is accelerated already"):
        cachec.accelerate(accelerated, method="taylor", steps=STEPS)


def test_only_known_pipelines_are_taken():
    with pytest.raises(InputError, match="the pipeline is a dict; cachec knows FluxPipeline"):
        cachec.accelerate({})


EVERYTHING = ",".join(map(str, range(STEPS)))


@pytest.fixture(scope="module")
def uncached_bfloat16():
    return run(load().to(torch.bfloat16))


@pytest.mark.parametrize("method", ["taylor", "adams"])
def test_bfloat16_pipelines_keep_their_weights_and_round_less(method, uncached, uncached_bfloat16):
    pipeline = load().to(torch.bfloat16)
    given = {id(parameter) for parameter in pipeline.transformer.parameters()}
    cachec.accelerate(pipeline, method=method, steps=STEPS, schedule=EVERYTHING, options={"order": "1"}, compiled=False)
    weights = dict(pipeline.transformer._engines["compute"]._native.named_parameters())
    assert {tensor.dtype for tensor in weights.values() if id(tensor) in given} == {torch.bfloat16}
    widened = {name for name, tensor in weights.items() if id(tensor) not in given}
    assert widened
    assert all(".norm_" in name and weights[name].dtype == torch.float32 for name in widened)
    got = run(pipeline)
    assert relative_error(got, uncached) < relative_error(uncached_bfloat16, uncached)
    assert relative_error(got, uncached_bfloat16) < 0.1  # the pipeline rounds its timesteps


def test_bfloat16_features_are_forecast(uncached_bfloat16):
    pipeline = load().to(torch.bfloat16)
    cachec.accelerate(pipeline, method="taylor", steps=STEPS, schedule="0,1,2,5,8", compiled=False)
    first = run(pipeline)
    assert 1e-4 < relative_error(first, uncached_bfloat16) < 0.2
    (session,) = pipeline.transformer._sessions.values()
    assert session.slots["feature"].dtype == torch.bfloat16
    np.testing.assert_array_equal(run(pipeline), first)


def test_a_pipeline_that_was_moved_since_is_refused(accelerated):
    inputs = {"hidden_states": torch.zeros(2, 64, 64, device="meta")}
    inputs |= {"encoder_hidden_states": torch.zeros(2, 16, 64), "pooled_projections": torch.zeros(2, 64)}
    with pytest.raises(InputError, match="hidden_states are not on cpu, where this pipeline was accelerated"):
        accelerated.transformer(**inputs, guidance=torch.ones(2), timestep=torch.ones(2))


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "float16"}])
def test_another_device_or_precision_is_not_made(options):
    pipeline = load()
    with pytest.raises(
        InputError, match=f"{next(iter(options))} cannot be given: the pipeline's own are taken; move it first with pipe.to"
    ):
        cachec.accelerate(pipeline, method="taylor", steps=STEPS, **options)
    assert isinstance(pipeline.transformer, torch.nn.Module)
