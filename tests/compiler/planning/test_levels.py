"""Levels measured by an evaluator on prompts of their own, and the gate."""

import numpy as np
import pytest
from toy_calibration import make_calibration, sampling_of

import cachec
from cachec.compiler.calibration.metrics import latent_rel_l2, psnr_db, ssim
from cachec.compiler.methods.adams import Adams
from cachec.compiler.planning import levels as module
from cachec.compiler.planning.levels import check_quality, forecast_cost, measure_levels
from cachec.compiler.tables.lower import lower_advance, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, QualityError
from cachec.runtime.program import UNCACHED, ProgramKey, hash_sigmas

STEPS = 8


def decode(latents):
    """Pictures [P, 8, 10, 3] of latents: each element is a patch."""
    tiles = np.kron(latents, np.ones((1, 2, 2)))
    return np.repeat(0.5 + 0.1 * tiles[..., None], 3, axis=-1) * np.array([1.0, 0.8, 0.6])


@pytest.fixture
def measured():
    uses = ["fit", "measure", "stop", "measure", "measure"]
    return make_calibration(5, STEPS, fine_steps=16, uses=uses).of("measure")


@pytest.fixture
def programs(measured):
    sampling = sampling_of(STEPS)
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {})
    table = Adams(2).table(Schedule(STEPS, (0, 2, 5)), measured.sigmas, None)
    return {
        "fast": lower_advance(table, key, Sampling(sampling.sigmas, sampling.timesteps)),
        UNCACHED: lower_uncached(key, Sampling(sampling.sigmas, sampling.timesteps)),
    }


def measure(measured, programs):
    return measure_levels(decode, measured.evaluator, programs, measured)


def test_without_pictures_figures_are_of_latents_alone(measured, programs):
    whole = measure(measured, programs)["fast"]
    alone = measure_levels(None, measured.evaluator, programs, measured)["fast"]
    assert set(alone) == {name for name in whole if "psnr" not in name and "ssim" not in name}
    assert alone["latent_error"] == whole["latent_error"]


def test_figures_are_those_of_pictures_and_latents_of_each_prompt(measured, programs):
    facts = measure(measured, programs)
    assert set(facts) == {"fast"}
    final, fine = measured.latents(STEPS), measured.statistics.fine_latents[measured.index, -1]
    latents = measured.play(programs["fast"])
    psnr = [psnr_db(a, b) for a, b in zip(decode(latents), decode(final), strict=True)]
    to_fine = [psnr_db(a, b) for a, b in zip(decode(latents), decode(fine), strict=True)]
    errors = [latent_rel_l2(a, b) for a, b in zip(latents, final, strict=True)]
    known = facts["fast"]
    assert known["num_prompts"] == 3
    assert known["psnr_db"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert known["psnr_db_min"] == pytest.approx(min(psnr), abs=1e-3)
    assert known["psnr_db_fine"] == pytest.approx(np.mean(to_fine), abs=1e-3)
    similar = [ssim(a, b) for a, b in zip(decode(latents), decode(final), strict=True)]
    assert known["ssim_min"] == pytest.approx(min(similar), abs=1e-5)
    assert known["latent_error"] == pytest.approx(np.mean(errors), abs=1e-6)
    assert known["latent_error_max"] == pytest.approx(max(errors), abs=1e-6)
    assert set(known) >= {"psnr_db_stderr", "psnr_db_p5", "ssim", "ssim_stderr", "ssim_p5", "ssim_min", "latent_error_p95"}


def test_the_speed_is_that_of_the_loops_after_a_warm_up(measured, programs, monkeypatch):
    clock, played = [0.0], []

    def play(program, noise, conditions):
        played.append(program)
        clock[0] += 1.0 if program is programs["fast"] else 3.0
        clock[0] += 50.0 * (played.count(program) == 1)  # the first one sets up
        return noise

    monkeypatch.setattr(measured.evaluator, "play", play)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert measure(measured, programs)["fast"]["speedup"] == 3.0
    assert [played.count(programs[name]) for name in ("fast", UNCACHED)] == [1 + 3, 1 + 3]


def test_a_level_that_is_not_finite_names_the_prompt(measured, programs, monkeypatch):
    monkeypatch.setattr(measured.evaluator, "play", lambda program, noise, conditions: np.full_like(noise, np.nan))
    with pytest.raises(InputError, match=r"NaN or infinity at step 8 for prompt 1 \('prompt 1'\)"):
        measure(measured, programs)


def test_the_gate_names_the_level_and_what_is_missing():
    facts = {"high": {"psnr_db": 41.0, "num_prompts": 8}, "equal": {"psnr_db": None, "num_prompts": 8}}
    check_quality(facts, None)
    check_quality(facts, 41.0)
    message = r"level high reaches 41\.00 dB on 8 held-out prompts, 1\.50 dB below --min-psnr 42\.5: compute more steps"
    with pytest.raises(QualityError, match=message):
        check_quality(facts, 42.5)


def test_the_cost_of_a_forecast_is_measured_on_engines_that_leave_the_prompt_to_the_prologue(toy_bundle):
    with cachec.load(toy_bundle) as loaded:
        assert "prompt" not in {spec.name for spec in loaded.engines["compute"].signature.inputs}
        cost = forecast_cost(loaded.engines, loaded.programs[UNCACHED], loaded.io)
        assert 0 < cost <= 1
