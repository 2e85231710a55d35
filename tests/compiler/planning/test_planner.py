"""The planner on the calibration toy: what a goal becomes, on which prompts it is fitted, and by which it is chosen."""

import numpy as np
import pytest
from toy_calibration import make_calibration, sampling_of

import cachec.compiler.planning.planner as module
import cachec.compiler.planning.search as search
from cachec.compiler.methods.adams import Adams
from cachec.compiler.methods.bns import Bns
from cachec.compiler.methods.gram import Gram
from cachec.compiler.planning.goals import Goal
from cachec.compiler.planning.planner import Calibrations, Planner
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, QualityError
from cachec.runtime.program import ProgramKey, hash_sigmas

STEPS, FINE = 8, 16
DRAFT = Gram(polish=0)
KEY = ProgramKey(STEPS, hash_sigmas(sampling_of(STEPS).sigmas), {"height": 4})


def decode(latents):
    """Pictures [P, 4, 5, 1] of latents."""
    return 0.5 + 0.1 * latents[..., None]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(search, "STARTS", 3)
    monkeypatch.setattr(search, "ANNEALING", (20, 0.3, 1e-3))
    monkeypatch.setattr(search, "CLOSED_MOVES", 3)


@pytest.fixture(scope="module")
def calibrations():
    both = [make_calibration(12, STEPS, fine_steps=FINE, fine=fine) for fine in (False, True)]
    return Calibrations(*both)


@pytest.fixture
def make(calibrations):
    def planner(method=DRAFT, calibrations=calibrations, *, to_fine=False, cost=0.0):
        given = {"key": KEY, "parameters": None, "to_fine": to_fine, "forecast_cost": cost, "seed": 0}
        return Planner(method, calibrations, sampling=sampling_of, decode=decode, **given)

    return planner


def psnr(calibration, program):
    """By hand, mean in dB over the prompts to stop by."""
    chosen = calibration.of("stop")
    pictures, wanted = (decode(x) for x in (chosen.play(program), chosen.latents(chosen.num_steps)))
    return np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(pictures, wanted, strict=True)])


def test_a_given_schedule_needs_no_calibration(make):
    plan = make(Adams(2), None).plan(Goal("mine", schedule=Schedule(STEPS, (0, 2, 5))))
    assert plan.program.compute_steps == (0, 2, 5)
    assert (plan.program.key.level, plan.program.key.sizes) == ("mine", {"height": 4})
    assert plan.facts() == {"goal": "3 given steps", "computed": 3, "grid": STEPS, "target": "uncached run"}


def test_a_budget_is_searched_and_fitted_on_prompts_to_fit_on_alone(make, monkeypatch):
    seen, real = [], Gram.calibrate

    def calibrate(self, some, schedule):
        seen.append(some.index)
        return real(self, some, schedule)

    monkeypatch.setattr(Gram, "calibrate", calibrate)
    plan = make().plan(Goal(budget=3))
    assert len(plan.program.compute_steps) == 3
    assert seen
    assert all(place % 4 != 3 for index in seen for place in index)


def chosen_by_pictures(monkeypatch, caplog, given):
    """The steps of a budget, and what was said, where 4 prompts are enough to choose by."""
    monkeypatch.setattr(module, "MIN_CHOOSE", 4)
    coarse = make_calibration(12, STEPS, uses=[*["fit"] * 6, "stop", *["choose"] * 5])
    planner = Planner(Gram(0, "pictures"), Calibrations(coarse, None), sampling=sampling_of, **given)
    with caplog.at_level("WARNING"):
        first, again = (planner.plan(Goal(level, budget=3)).program.compute_steps for level in ("a", "b"))
    assert first == again
    return first, caplog.messages


GIVEN = {"key": KEY, "parameters": None, "to_fine": False, "forecast_cost": 0.0, "seed": 0}


def test_a_budgets_schedule_is_chosen_once_by_pictures_of_others(monkeypatch, caplog):
    choices, real = [], module.PictureChoice.choose

    def choose(self, searched):
        choices.append((self.fit.index.tolist(), self.choosing.index.tolist(), real(self, searched)))
        return choices[-1][-1]

    finished, finish = [], Gram.finish
    monkeypatch.setattr(
        Gram, "finish", lambda self, runs, schedule, begun: (finished.append(schedule), finish(self, runs, schedule, begun))[1]
    )
    monkeypatch.setattr(module.PictureChoice, "choose", choose)
    steps, said = chosen_by_pictures(monkeypatch, caplog, {**GIVEN, "decode": decode})
    assert choices == [(list(range(6)), list(range(7, 12)), steps)]
    assert finished == [Schedule(STEPS, steps)]  # goes on from what it was chosen with
    assert said == ["gram is fitted to 6 prompts, its schedule chosen by pictures of 5 others"]


def test_without_pictures_or_enough_prompts_schedules_stay_as_searched_and_that_is_said(make, monkeypatch, caplog):
    monkeypatch.setattr(module.PictureChoice, "choose", lambda *_: pytest.fail("chosen by pictures"))
    _, said = chosen_by_pictures(monkeypatch, caplog, {**GIVEN, "decode": None})
    text = "gram is fitted to 6 prompts, its schedule chosen by latents of the same: pictures take 4 prompts to choose by, but "
    assert said == [f"{text}there is nothing to decode latents with"]
    caplog.clear()
    make(Gram(0, "pictures")).plan(Goal(budget=3))
    assert caplog.messages[-1].endswith("of the same: pictures take 4 prompts to choose by, but there are 0")


def test_a_quality_is_reached_with_the_fewest_steps_on_the_prompts_to_stop_by(make, calibrations):
    planner, target = make(), 45.0
    plan = planner.plan(Goal(psnr=target))
    computed = len(plan.program.compute_steps)
    assert psnr(calibrations.coarse, plan.program) >= target
    assert 1 < computed < STEPS
    assert psnr(calibrations.coarse, planner.plan(Goal(budget=computed - 1)).program) < target


def test_a_quality_out_of_reach_names_the_best(make):
    with pytest.raises(QualityError, match=r"no level reaches 500\.00 dB: the best reachable is"):
        make().plan(Goal(psnr=500.0))


def test_a_finished_fit_that_misses_what_its_draft_reached_gets_another_step(make, monkeypatch):
    planner, target = make(Gram(polish=1)), 45.0
    drafted = len(make().plan(Goal(psnr=target)).program.compute_steps)
    real = Planner._psnr

    def worse(self, latents, *, against_fine):
        return real(self, latents, against_fine=against_fine) - (0 if drafting else 20)

    drafting, fit = [], Planner._fit

    def fitted(self, goal, schedule, fine, *, draft=False):
        drafting[:] = [True] if draft else []
        return fit(self, goal, schedule, fine, draft=draft)

    monkeypatch.setattr(Planner, "_psnr", worse)
    monkeypatch.setattr(Planner, "_fit", fitted)
    assert len(planner.plan(Goal(psnr=target)).program.compute_steps) > drafted


def test_a_speed_takes_as_many_steps_as_it_allows(make):
    assert len(make().plan(Goal(speedup=2.0)).program.compute_steps) == 4
    assert len(make(cost=0.1).plan(Goal(speedup=2.0)).program.compute_steps) == 3


def test_level_fine_is_as_close_to_the_finer_run_as_the_uncached_run(make, calibrations):
    plan = make().plan(Goal("fine", fine=True))
    assert plan.program.num_steps == FINE
    assert plan.facts()["target"] == "fine reference"
    stop = calibrations.fine.of("stop")
    wanted = decode(stop.latents(FINE))

    def close(latents):
        return np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(decode(latents), wanted, strict=True)])

    assert close(stop.play(plan.program)) >= close(calibrations.coarse.of("stop").latents(STEPS))


def test_without_a_fine_reference_level_fine_says_how_to_make_one(make, calibrations):
    with pytest.raises(InputError, match="has no fine reference: make one with cachec calibrate --reference-steps"):
        make(calibrations=Calibrations(calibrations.coarse, None)).plan(Goal("fine", fine=True))


def test_goals_share_searches_and_fits(make, monkeypatch):
    searched, fitted, search_one, calibrate = [], [], module.search_schedule, Gram.calibrate
    monkeypatch.setattr(
        module, "search_schedule", lambda *given, **more: (searched.append(given[3]), search_one(*given, **more))[1]
    )
    monkeypatch.setattr(Gram, "calibrate", lambda *given: (fitted.append(given[2].compute), calibrate(*given))[1])
    planner = make()
    first, done = planner.plan(Goal("a", budget=3)).program, len(fitted)
    again = planner.plan(Goal("b", budget=3)).program
    assert (searched, len(fitted)) == ([3], done)
    assert first.compute_steps == again.compute_steps
    assert (first.key.level, again.key.level) == ("a", "b")


def test_a_method_that_needs_gradients_is_refused_before_anything_runs(make, calibrations, monkeypatch):
    monkeypatch.setattr(type(calibrations.coarse.evaluator), "differentiable", False)
    with pytest.raises(InputError, match="bns needs gradients of the model"):
        make(Bns())


def test_a_psnr_takes_pictures(calibrations):
    given = {"key": KEY, "parameters": None, "to_fine": False, "forecast_cost": 0.0, "seed": 0}
    planner = Planner(DRAFT, calibrations, sampling=sampling_of, decode=None, **given)
    assert len(planner.plan(Goal(budget=3)).program.compute_steps) == 3
    with pytest.raises(InputError, match="there is nothing to decode latents with: ask for a budget"):
        planner.plan(Goal(psnr=20.0))
