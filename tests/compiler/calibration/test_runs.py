"""Uncached runs, recorded: against plain sampling by hand, in batches that an interruption does not lose."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import TOKENS, WIDTH
from toy_model import POISON, SETTINGS, ToyModel

from cachec.compiler.calibration import runs as module
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import (
    Subject,
    WantedRun,
    encode_ahead,
    encode_prompts,
    measuring_seeds,
    record_runs,
    record_trajectories,
    recording_here,
    run_uncached,
    training_seeds,
)
from cachec.compiler.models import find_model, load_model
from cachec.runtime.errors import InputError
from cachec.runtime.noise import NUM_SEEDS, make_noise

PROMPTS = ("a circle", "a ring", "a cross", "a star", "a square")


@pytest.fixture(scope="module")
def model():
    return ToyModel()


@pytest.fixture
def evaluator(model, toy_split):
    return GraphEvaluator(toy_split, model.io)


@pytest.fixture
def record(model, evaluator):
    def recorded(prompts=PROMPTS, *, work=None, chunk=2, evaluator=evaluator):
        def keep(steps):
            return {"final": list(steps)[-1].latents}

        subject = Subject.of(model, SETTINGS)
        wanted = [WantedRun(subject.own_sampling, keep)]
        seeds = range(len(prompts))
        return record_runs(
            recording_here(subject, evaluator), prompts, wanted, seeds=seeds, chunk=chunk, work=work, title="recording"
        )

    return recorded


def test_an_uncached_run_is_the_pipelines_own(model, evaluator):
    sampling = model.sampling(SETTINGS)
    noise, conditions = np.stack([make_noise(i, (TOKENS, WIDTH)) for i in range(5)]), encode_prompts(model, PROMPTS, SETTINGS)
    steps = list(run_uncached(evaluator, sampling, noise, conditions))
    assert len(steps) == sampling.num_steps == SETTINGS.steps
    np.testing.assert_allclose(steps[-1].latents, model.generate(conditions, noise, SETTINGS), atol=1e-5)
    velocity, feature = evaluator.evaluate(steps[0].latents, float(sampling.timesteps[1]), conditions)
    np.testing.assert_allclose(steps[1].velocity, velocity, atol=1e-6)
    np.testing.assert_allclose(steps[1].feature, feature, atol=1e-6)


def test_runs_are_those_of_each_prompt_with_its_noise(model, evaluator, record):
    recorded = record()
    for index, prompt in enumerate(PROMPTS):
        noise = make_noise(index, (TOKENS, WIDTH))[None]
        np.testing.assert_array_equal(recorded["noise"][index], noise[0])
        final = model.generate(model.encode([prompt], SETTINGS, ["prompt"]), noise, SETTINGS)
        np.testing.assert_allclose(recorded["final"][index], final[0], atol=1e-5)


def test_after_an_interruption_finished_batches_are_not_run_again(record, tmp_path, monkeypatch):
    whole, real, made = record(), module.make_noise, []

    def interrupted(seed, shape):
        made.append(seed)
        if made.count(4) == 1 and seed == 4:
            raise KeyboardInterrupt
        return real(seed, shape)

    monkeypatch.setattr(module, "make_noise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(work=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs-0000.safetensors", "runs-0002.safetensors"]
    again = record(work=tmp_path)
    assert made == [0, 1, 2, 3, 4, 4]
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)


@pytest.mark.parametrize("place", [0, 4])
def test_nan_names_the_prompt_and_the_step_and_its_batch_is_not_kept(record, tmp_path, place):
    prompts = (*PROMPTS[:place], POISON, *PROMPTS[place + 1 :])
    with pytest.raises(InputError, match=rf"NaN or infinity at step 0 for prompt {place + 1} \('poison'\)"):
        record(prompts, work=tmp_path)
    assert not (tmp_path / f"runs-{place - place % 2:04d}.safetensors").exists()


def test_nan_in_the_middle_of_a_run_names_that_step(record, evaluator, monkeypatch):
    real, asked = evaluator.evaluate, []

    def evaluate(x, t, conditions):
        velocity, feature = real(x, t, conditions)
        asked.append(t)
        velocity[1] = np.inf if len(asked) == 3 else velocity[1]
        return velocity, feature

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    with pytest.raises(InputError, match=r"at step 2 for prompt 2 \('a ring'\)"):
        record()
    assert len(asked) == 3


def test_trajectories_hold_every_feature_and_go_on_where_they_were(model, evaluator, tmp_path):
    settings = replace(SETTINGS, steps=3)
    subject = Subject.of(model, settings)
    runs = record_trajectories(subject, recording_here(subject, evaluator), PROMPTS, seed=1, work=tmp_path)
    assert runs.features.shape == (5, 3, TOKENS, WIDTH)
    sampling, noise = model.sampling(settings), make_noise(training_seeds(1, 5)[2], (TOKENS, WIDTH))[None]
    steps = list(run_uncached(evaluator, sampling, noise, model.encode([PROMPTS[2]], settings, ["prompt"])))
    some = runs.select(np.array([2]))
    np.testing.assert_allclose(some.final, steps[-1].latents, atol=1e-5)
    np.testing.assert_allclose(some.features[0], np.concatenate([step.feature for step in steps]), atol=1e-5)
    np.testing.assert_array_equal(some.conditions["prompt"], model.encode([PROMPTS[2]], settings, ["prompt"])["prompt"])
    again = record_trajectories(subject, recording_here(subject, None), PROMPTS, seed=1, work=tmp_path)  # nothing is evaluated
    np.testing.assert_array_equal(again.features, runs.features)


def test_of_many_tokens_some_stand_for_all(model, evaluator, tmp_path):
    settings = replace(SETTINGS, steps=3)
    subject = Subject.of(model, settings)
    here = recording_here(subject, evaluator)
    whole, some = (
        record_trajectories(subject, here, PROMPTS, seed=1, work=tmp_path / str(size), max_bytes=size)
        for size in (10**6, 5 * 3 * WIDTH * 2 * 2)
    )
    assert (whole.tokens.tolist(), len(some.tokens)) == (list(range(TOKENS)), 2)
    bits = torch.from_numpy(whole.features[:, :, some.tokens]).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(some.features, bits)
    np.testing.assert_array_equal(some.final, whole.final)


def test_no_noise_is_for_people_and_for_fits_or_for_fits_and_measurements():
    fitted, measured = training_seeds(3, 300), measuring_seeds(3, 64)
    assert min(*fitted, *measured) >= NUM_SEEDS
    assert not set(fitted) & set(measured)
    assert not set(fitted) & set(training_seeds(4, 300))
    assert not set(measuring_seeds(4, 64)) & set(measured)


def test_what_is_encoded_ahead_needs_no_text_encoders_any_more():
    model = load_model(find_model("tiny-flux"))
    settings = replace(SETTINGS, height=32, width=32, text_tokens=24, guidance=3.5)
    wanted = encode_prompts(model, PROMPTS, settings)
    encode_ahead(model, PROMPTS, settings)
    assert model.pipeline.text_encoder is None
    assert model.pipeline.text_encoder_2 is None
    known = encode_prompts(model, PROMPTS[::-1], settings)
    assert model.pipeline.text_encoder_2 is None
    for name, value in wanted.items():
        np.testing.assert_array_equal(known[name][::-1], value)
    encode_prompts(model, PROMPTS, replace(settings, text_tokens=8))  # others are encoded as before
    assert model.pipeline.text_encoder_2 is not None
