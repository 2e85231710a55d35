"""Calibration statistics on the toy DiT: what is in a calibration, how it is resumed, saved, read, and refused."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy import TOKENS, WIDTH
from toy_model import SETTINGS, ToyModel

import cachec.compiler.calibration.statistics as module
from cachec.compiler.calibration.calibration import open_calibration
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import (
    Subject,
    measuring_seeds,
    recording_here,
    run_uncached,
    training_seeds,
)
from cachec.compiler.calibration.statistics import (
    ARRAYS,
    FILE,
    calibration_cost,
    calibration_facts,
    check_statistics,
    gram,
    load_statistics,
    record_statistics,
    save_statistics,
)
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.runtime.errors import EngineError, InputError, OutputError
from cachec.runtime.noise import make_noise
from cachec.runtime.program import hash_sigmas

PROMPTS = UsedPrompts(("a circle", "a ring", "a cross", "a star", "a square"), ("fit", "fit", "stop", "measure", "measure"))
STEPS, FINE = SETTINGS.steps, 8


def subject_of(model, **changed):
    """The toy with its own settings, or with some that it would not take."""
    subject = Subject.of(model, SETTINGS)
    return replace(subject, settings=replace(subject.settings, **changed))


@pytest.fixture(scope="module")
def model():
    return ToyModel()


@pytest.fixture
def evaluator(model, toy_split):
    return GraphEvaluator(toy_split, model.io)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)  # five prompts are three batches, the last one smaller


@pytest.fixture
def record(model, evaluator):
    def recorded(prompts=PROMPTS, settings=SETTINGS, *, model=model, fine=FINE, seed=0, work=None):
        subject = Subject.of(model, settings)
        here = recording_here(subject, evaluator)
        return record_statistics(subject, here, prompts, reference_steps=fine, seed=seed, work=work)

    return recorded


@pytest.fixture
def statistics(record):
    return record(PROMPTS.only("fit"), fine=0)


def arrays_of(statistics):
    return {name: value for name in ARRAYS if (value := getattr(statistics, name)) is not None}


def assert_same_bits(left, right):
    assert left.facts == right.facts
    assert {name: value.tobytes() for name, value in arrays_of(left).items()} == {
        name: value.tobytes() for name, value in arrays_of(right).items()
    }


def straight_run(model, evaluator, prompt, noise, num_steps):
    """Velocities, features and latents [T, …] of one uncached run of one prompt."""
    sampling = model.sampling(replace(SETTINGS, steps=num_steps))
    steps = list(run_uncached(evaluator, sampling, noise[None], model.encode([prompt], SETTINGS, ["prompt"])))
    return tuple(np.concatenate([getattr(s, name) for s in steps]) for name in ("velocity", "feature", "latents"))


def brute_gram(values):
    flat = values.reshape(len(values), -1).astype(np.float64)
    return np.array([[(a * b).sum() for b in flat] for a in flat])


def test_statistics_are_those_of_runs_of_each_prompt(record, model, evaluator):
    statistics = record()
    seeds = [*training_seeds(0, 3), *measuring_seeds(0, 2)]
    for index, prompt in enumerate(PROMPTS.prompts):
        noise = make_noise(seeds[index], (TOKENS, WIDTH))
        np.testing.assert_array_equal(statistics.noise[index], noise)
        velocities, features, latents = straight_run(model, evaluator, prompt, noise, STEPS)
        np.testing.assert_allclose(statistics.latents[index], latents, atol=1e-5)
        np.testing.assert_allclose(statistics.velocity_gram[index], brute_gram(velocities), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(statistics.feature_gram[index], brute_gram(features), rtol=1e-4, atol=1e-4)
        velocities, _, latents = straight_run(model, evaluator, prompt, noise, FINE)
        np.testing.assert_allclose(statistics.fine_latents[index], latents, atol=1e-5)
        np.testing.assert_allclose(statistics.fine_velocity_gram[index], brute_gram(velocities), rtol=1e-4, atol=1e-4)


def test_gram_equals_all_inner_products():
    values = np.random.default_rng(0).standard_normal((3, 4, 2, 5)).astype(np.float32)
    got = gram(list(values))
    assert got.shape == (4, 3, 3)
    assert got.dtype == np.float64
    for prompt in range(4):
        np.testing.assert_allclose(got[prompt], brute_gram(values[:, prompt]), rtol=1e-12)


def test_another_seed_is_other_noise_and_the_same_prompts(record):
    one, other = record(fine=0), record(fine=0, seed=1)
    assert not np.isin(one.noise, other.noise).any()
    assert one.prompts == other.prompts == PROMPTS


def test_a_file_holds_all_of_it(record, tmp_path):
    statistics = record()
    path = tmp_path / "deep" / "toy.calibration"
    save_statistics(statistics, path)
    read = load_statistics(path)
    assert_same_bits(read, statistics)
    assert read.prompts == PROMPTS
    assert read.origin == str(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_a_fine_reference_there_is_none_in_the_file(record, tmp_path):
    save_statistics(record(fine=0), tmp_path / "c")
    read = load_statistics(tmp_path / "c")
    assert read.fine_latents is None
    assert read.fine_velocity_gram is None
    assert read.facts["reference_steps"] == "0"


def test_prompts_with_odd_characters_come_back(record, tmp_path):
    odd = UsedPrompts(('quotes " and \\', "line\nbreak", "Ölbild 🖼"), ("fit", "stop", "measure"))
    save_statistics(record(odd, fine=0), tmp_path / "c")
    assert load_statistics(tmp_path / "c").prompts == odd


def test_a_lost_batch_is_made_again_bit_for_bit(record, tmp_path):
    work = tmp_path / "work"
    whole = record(work=work)
    names = ["calibration.json", *(f"runs-000{start}.safetensors" for start in (0, 2, 4))]
    assert sorted(p.name for p in work.iterdir()) == names
    (work / names[2]).unlink()
    assert_same_bits(record(work=work), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"fine": 0},
        {"prompts": PROMPTS.only("fit")},
        {"prompts": replace(PROMPTS, uses=("fit",) * 5)},
        {"settings": replace(SETTINGS, guidance=2.0)},
        {"model": ToyModel(weights="b" * 64)},
    ],
    ids=lambda change: ",".join(change),
)
def test_a_work_directory_of_other_settings_is_refused_and_left_alone(record, tmp_path, change):
    work = tmp_path / "work"
    record(work=work)
    before = {p.name: p.read_bytes() for p in work.iterdir()}
    with pytest.raises(InputError, match="work holds an unfinished calibration with other settings: finish it, or remove"):
        record(work=work, **change)
    assert {p.name: p.read_bytes() for p in work.iterdir()} == before


def test_a_work_directory_with_batches_of_another_size_is_refused(record, tmp_path, monkeypatch):
    work = tmp_path / "work"
    record(work=work)
    monkeypatch.setattr(module, "CHUNK", 3)
    with pytest.raises(InputError, match="with other settings"):
        record(work=work)


def test_a_work_directory_that_cannot_be_made_is_an_error_of_the_output(record, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write .*work: Not a directory"):
        record(work=tmp_path / "file" / "work")


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (subject_of(ToyModel(weights="b" * 64)), "weights_sha256 is aaaa.*, wanted bbbb"),
        (subject_of(ToyModel(), steps=8), "steps is 4, wanted 8"),
        (subject_of(ToyModel(scheduler=object())), "sampler is FlowEuler, wanted object"),
        (subject_of(ToyModel(shift=0.5)), "sigmas is [0-9a-f]{16}, wanted [0-9a-f]{16}"),
        (subject_of(ToyModel(), height=12), "height is 16, wanted 12"),
        (subject_of(ToyModel(), width=16), "width is 24, wanted 16"),
        (subject_of(ToyModel(), text_tokens=2), "text_tokens is 1, wanted 2"),
        (subject_of(ToyModel(), guidance=3.5), "guidance is 1.0, wanted 3.5"),
    ],
    ids=["weights", "steps", "sampler", "noise levels", "height", "width", "text", "guidance"],
)
def test_statistics_of_something_else_are_refused_with_the_reason(statistics, subject, reason):
    with pytest.raises(
        InputError, match=f"calibration made now .made for toy. is of something else: .*{reason}.*cachec calibrate"
    ):
        check_statistics(statistics, calibration_facts(subject, None))


def test_all_reasons_are_given_and_only_those(record):
    wanted = calibration_facts(subject_of(ToyModel(shift=0.5), height=12), FINE)
    with pytest.raises(InputError) as error:
        check_statistics(record(PROMPTS.only("stop")), wanted)
    assert [part.split(" is ")[0] for part in str(error.value).split("else: ")[1].split("; ")] == ["sigmas", "height"]


def test_statistics_of_the_same_are_accepted_with_any_or_the_right_reference(record, model):
    statistics = record(PROMPTS.only("stop"))
    check_statistics(statistics, calibration_facts(subject_of(model), None))
    check_statistics(statistics, calibration_facts(subject_of(model), FINE))
    with pytest.raises(InputError, match="reference_steps is 8, wanted 16"):
        check_statistics(statistics, calibration_facts(subject_of(model), 16))
    with pytest.raises(InputError, match="weights_sha256 is unknown"):
        check_statistics(replace(statistics, facts={}), calibration_facts(subject_of(model), None))


def test_facts_name_the_noise_levels(model):
    assert calibration_facts(subject_of(model), None)["sigmas"] == hash_sigmas(model.sampling(SETTINGS).sigmas)


@pytest.fixture
def written(record, tmp_path):
    path = tmp_path / "toy.calibration"
    save_statistics(record(PROMPTS.only("fit"), fine=0), path)
    return path


@pytest.mark.parametrize("lost", ["noise", "latents", "velocity_gram", "feature_gram", "prompts", "uses"])
def test_a_file_with_something_missing_is_refused(written, lost):
    statistics = load_statistics(written)
    tensors = {name: value for name, value in arrays_of(statistics).items() if name != lost}
    save_file(tensors, written, {name: value for name, value in statistics.facts.items() if name != lost})
    with pytest.raises(InputError, match=f"is not a calibration file, or is damaged .*{lost}"):
        load_statistics(written)


@pytest.mark.parametrize("budget", [1, 200, 700, 3000, 2**30])
@pytest.mark.parametrize("num", [1, 5])
def test_recorded_features_fit_the_memory_they_may_take(monkeypatch, budget, num):
    monkeypatch.setattr(module, "MAX_FEATURE_BYTES", budget)
    cost = calibration_cost((TOKENS, WIDTH), (TOKENS, WIDTH), SETTINGS, num, 0)
    token = STEPS * WIDTH * 4
    assert 1 <= cost.chunk <= min(num, module.CHUNK)
    assert cost.chunk * cost.feature_tokens * token <= max(budget, token)  # one token of one prompt is the least there is
    if cost.feature_tokens < TOKENS:  # tokens are left out only where one prompt does not fit
        assert cost.chunk == 1
        assert (cost.feature_tokens + 1) * token > budget
        assert f"features of {cost.feature_tokens} of {TOKENS} tokens" in str(cost)
    else:
        assert "features of all tokens" in str(cost)


def test_of_a_long_sequence_some_tokens_are_kept_and_prompts_run_together():
    cost = calibration_cost((4096, 64), (4096, 3072), replace(SETTINGS, steps=28), 16, 0)
    assert (cost.feature_tokens, cost.chunk) == (256, min(module.CHUNK, 12))


def test_few_tokens_give_the_gram_of_those_tokens(record, model, evaluator, monkeypatch):
    whole = record(fine=0)
    monkeypatch.setattr(module, "MAX_FEATURE_BYTES", 3 * STEPS * WIDTH * 4)
    few = record(fine=0)
    assert few.facts["feature_tokens"] == "3"
    np.testing.assert_allclose(few.velocity_gram, whole.velocity_gram, rtol=1e-5, atol=1e-5)
    tokens = np.sort(np.random.default_rng(0).permutation(TOKENS)[:3])
    _, features, _ = straight_run(model, evaluator, PROMPTS.prompts[0], few.noise[0], STEPS)
    np.testing.assert_allclose(few.feature_gram[0], brute_gram(features[:, tokens]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fine", [1, 4, 6])
def test_a_reference_that_is_no_multiple_is_refused(record, tmp_path, fine):
    with pytest.raises(InputError, match=f"reference-steps is {fine}; it must be a multiple of the 4 steps, such as 16"):
        record(fine=fine, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_cost_says_how_large_the_file_gets(record):
    statistics = record()
    cost = calibration_cost((TOKENS, WIDTH), (TOKENS, WIDTH), SETTINGS, 5, FINE)
    tensors = sum(value.nbytes for value in arrays_of(statistics).values())
    assert cost.file_bytes == tensors
    assert cost.evaluations == 5 * (STEPS + FINE)


def test_of_prompts_to_choose_schedules_by_only_the_ends_of_their_runs_are_kept(model, evaluator, record, tmp_path):
    prompts = UsedPrompts((*PROMPTS.prompts, "a line", "a dot", "a wave"), (*PROMPTS.uses, *["choose"] * 3))
    statistics, plain = record(prompts, work=tmp_path / "work"), record()
    for name in ("latents", "velocity_gram", "feature_gram", "fine_latents", "fine_velocity_gram"):
        np.testing.assert_array_equal(getattr(statistics, name), getattr(plain, name))
    for index, seed in zip((5, 6, 7), training_seeds(0, 6)[3:], strict=True):
        np.testing.assert_array_equal(statistics.noise[index], noise := make_noise(seed, (TOKENS, WIDTH)))
        for steps, fine in ((STEPS, False), (FINE, True)):
            _, _, latents = straight_run(model, evaluator, prompts.prompts[index], noise, steps)
            np.testing.assert_allclose(statistics.ends(fine=fine)[index], latents[-1], atol=1e-5)
    cost = calibration_cost((TOKENS, WIDTH), (TOKENS, WIDTH), SETTINGS, 5, FINE, choosing=3)
    assert cost.file_bytes == sum(value.nbytes for value in arrays_of(statistics).values())
    assert cost.evaluations == 8 * (STEPS + FINE)
    save_statistics(statistics, tmp_path / "c")
    assert_same_bits(load_statistics(tmp_path / "c"), statistics)
    calibration = open_calibration(statistics, subject_of(model), evaluator)
    np.testing.assert_array_equal(calibration.of("choose").latents(STEPS), statistics.final)
    assert_same_bits(record(prompts, work=tmp_path / "work"), statistics)  # read from the batches, each where it was


def test_what_has_no_room_is_refused_before_anything_is_run(record, tmp_path, monkeypatch):
    size = 2 * calibration_cost((TOKENS, WIDTH), (TOKENS, WIDTH), SETTINGS, 5, FINE).file_bytes
    for free, error in ((size - 1, OutputError), (size, None)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with (
            nullcontext()
            if error is None
            else pytest.raises(error, match="the calibration takes .* of disk, and .* take fewer")
        ):
            record(work=tmp_path / "work")
    monkeypatch.setattr("cachec.runtime.room.free_memory", lambda: 100)
    with pytest.raises(EngineError, match="recording the calibration takes .* of memory, and this machine has 100.00 B free"):
        record()


def test_a_place_that_cannot_be_written_is_an_error_of_the_output(record, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        save_statistics(record(PROMPTS.only("stop"), fine=0), tmp_path / "file" / "c")
    assert (tmp_path / "file").read_text() == "mine"


def test_facts_are_readable_in_the_work_directory(record, tmp_path):
    record(work=tmp_path / "work")
    facts = json.loads((tmp_path / "work" / "calibration.json").read_text())
    assert (facts["model"], facts["num_prompts"], facts["format"]) == ("toy", "5", FILE.format)
