"""From goals to programs: search a schedule, fit the method to it, lower.

Shapes: ``T`` steps, ``P`` prompts.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cachec.compiler.calibration.calibration import Calibration, open_calibration
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.metrics import Decode, mean, psnr_db
from cachec.compiler.calibration.runs import Subject
from cachec.compiler.calibration.statistics import Statistics
from cachec.compiler.calibration.uses import MIN_CHOOSE
from cachec.compiler.methods.base import Method
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.planning.goals import Goal, budget_for_speedup, smallest_budget
from cachec.compiler.planning.pictured import PictureChoice
from cachec.compiler.planning.search import search_schedule
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower, with_starts
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LevelPlan:
    """What a level became: its Program on the sampler's grid, or on the fine reference's (``fine``)."""

    goal: Goal
    program: Program
    fine: bool

    def facts(self) -> Mapping[str, object]:
        """What the manifest says of the level, before it is measured."""
        return {
            "goal": str(self.goal),
            "computed": len(self.program.compute_steps),
            **({"work": self.program.work} if self.program.one_branch_steps else {}),
            "grid": self.program.num_steps,
            "target": "fine reference" if self.fine else "uncached run",
        }


@dataclass(frozen=True, eq=False)
class Calibrations:
    """The same statistics against the uncached run and, where they have one, against the fine reference."""

    coarse: Calibration
    fine: Calibration | None

    @property
    def facts(self) -> dict[str, str]:
        """What the manifest says of the runs."""
        return {name: text for name, text in self.coarse.statistics.facts.items() if name not in ("prompts", "uses")}

    @classmethod
    def open(cls, statistics: Statistics, subject: Subject, evaluator: Evaluator) -> "Calibrations":
        """``evaluator`` is of the model that the statistics are of, in their precision."""
        fine = None
        if statistics.fine_latents is not None:
            fine = open_calibration(statistics, subject, evaluator, fine=True)
        return cls(open_calibration(statistics, subject, evaluator), fine)


class Planner:
    """Chooses schedules and fits a method to them. Keeps what it has found, so that goals share searches and fits.

    It fits on the calibration's prompts to fit on, chooses budgets by those to stop by, and schedules by those that are there
    for it, where the method asks for that and there are enough. ``key`` is that of the Programs on the sampler's grid,
    ``sampling`` gives other grids by their steps; ``decode`` makes pictures, for goals that are a PSNR. ``to_fine``: fits go
    to the fine reference; ``forecast_cost``: a forecast's time over a computed step's.

    Raises:
        InputError: the method needs gradients, and the calibration's evaluator gives none.
    """

    def __init__(
        self,
        method: Method,
        calibrations: Calibrations | None,
        *,
        sampling: Callable[[int], Sampling],
        decode: Decode | None,
        key: ProgramKey,
        parameters: Parameters | None,
        to_fine: bool,
        forecast_cost: float,
        seed: int,
    ) -> None:
        self._method, self._calibrations, self._sampling, self._decode = method, calibrations, sampling, decode
        self._key, self._parameters, self._to_fine = key, parameters, to_fine
        self._forecast_cost, self._seed = forecast_cost, seed
        if method.needs_gradients and calibrations is not None:
            calibrations.coarse.evaluator.check_gradients(method.name)
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        self._chosen: dict[tuple[int, bool], Schedule] = {}
        self._begun: dict[tuple[Schedule, bool], Parameters] = {}
        self._fitted: dict[tuple[Schedule, bool, bool], Parameters] = {}
        self._references: dict[bool, list[Array]] = {}

    def plan(self, goal: Goal) -> LevelPlan:
        """The Program that serves a goal.

        Raises:
            QualityError: its target is out of reach.
            InputError: the budget does not fit the method, or there are too few prompts.
        """
        fine = goal.fine or self._to_fine
        if goal.schedule is not None:
            return self._fit(goal, goal.schedule, fine=False)
        if goal.budget is not None:
            return self._fit(goal, self._choose(goal.budget, fine), fine)
        if goal.speedup is not None:
            least = self._method.min_budget
            budget = budget_for_speedup(goal.speedup, self._key.steps, self._forecast_cost, least=least)
            return self._fit(goal, self._choose(budget, fine), fine)
        return self._reach(goal, fine)

    def _reach(self, goal: Goal, fine: bool) -> LevelPlan:
        """A small budget that reaches a PSNR: by drafts, then as finished fits allow (PSNR need not grow with budgets)."""
        target = self._uncached_psnr() if goal.fine else goal.psnr
        assert target is not None

        def reached(plan: LevelPlan) -> float:
            chosen_by = self._calibration(plan.fine).of("stop")
            return self._psnr(chosen_by.play(plan.program), against_fine=goal.fine)

        def draft(budget: int) -> float:
            return reached(self._fit(goal, self._search(budget, fine), fine, draft=True))

        least = self._method.min_budget
        budget, tried = smallest_budget(draft, target, least, self._key.steps), set[int]()
        plan = self._fit(goal, self._choose(budget, fine), fine)
        while reached(plan) < target and budget < self._key.steps:  # the draft was better by luck
            tried.add(budget)
            budget += 1
            plan = self._fit(goal, self._choose(budget, fine), fine)
        while budget > least and budget - 1 not in tried:
            smaller = self._fit(goal, self._choose(budget - 1, fine), fine)
            if reached(smaller) < target:
                break
            plan, budget = smaller, budget - 1
        log.info("level %s: %d computed steps reach %.2f dB", goal.level, budget, reached(plan))
        return plan

    def _choose(self, budget: int, fine: bool) -> Schedule:
        """What is fitted to the end: the searched schedule, or one that is chosen by pictures."""
        searched = self._search(budget, fine)
        if not self._method.by_pictures or budget in (1, searched.num_steps):
            return searched
        if (budget, fine) not in self._chosen:
            choice = self._picture_choice(fine)
            steps = searched.compute if choice is None else choice.choose(searched.compute)
            self._chosen[budget, fine] = schedule = Schedule(searched.num_steps, steps)
            if choice is not None and schedule in choice.begun:
                self._begun[schedule, fine] = choice.begun[schedule]
        return self._chosen[budget, fine]

    def _picture_choice(self, fine: bool) -> PictureChoice | None:
        """``None``, and why, where schedules stay those that a search by errors of latents finds."""
        known = self._calibration(fine)
        fit, places = known.of("fit"), known.statistics.prompts.places("choose")
        said = f"{self._method.name} is fitted to {fit.num_prompts} prompts, its schedule chosen by "
        if self._decode is None or len(places) < MIN_CHOOSE:
            lacks = "there is nothing to decode latents with" if self._decode is None else f"there are {len(places)}"
            log.warning("%slatents of the same: pictures take %d prompts to choose by, but %s", said, MIN_CHOOSE, lacks)
            return None
        log.warning("%spictures of %d others", said, len(places))
        return PictureChoice(self._method, fit, known.select(places), self._decode)

    def _search(self, budget: int, fine: bool) -> Schedule:
        if (budget, fine) not in self._schedules:
            fit, method = self._calibration(fine).of("fit"), self._method
            parameters = self._parameters
            if method.needs_calibration and not method.schedule_bound and parameters is None:
                parameters = method.calibrate(fit, Schedule(fit.num_steps, (0,)))
            self._schedules[budget, fine] = search_schedule(method, fit, parameters, budget, seed=self._seed)
        return self._schedules[budget, fine]

    def _fit(self, goal: Goal, schedule: Schedule, fine: bool, *, draft: bool = False) -> LevelPlan:
        method, parameters = self._method.draft() if draft else self._method, self._parameters
        sampling = self._sampling(schedule.num_steps)
        key = replace(self._key, steps=schedule.num_steps, sigmas_hash=hash_sigmas(sampling.sigmas), level=goal.level)
        if (
            not schedule.forecast and method.cut == "output" and parameters is None
        ):  # nothing is left to the method: the sampler's own steps
            return LevelPlan(goal, lower(AdvanceTable(schedule, sampling.moves[1:]), key, sampling), fine)
        if method.needs_calibration and parameters is None:  # none were given
            if (at := (schedule, fine, draft)) not in self._fitted:
                runs, begun = self._calibration(fine).of("fit"), None if draft else self._begun.get((schedule, fine))
                self._fitted[at] = method.calibrate(runs, schedule) if begun is None else method.finish(runs, schedule, begun)
            parameters = self._fitted[at]

        def make(schedule: Schedule) -> Program:
            return lower(method.table(schedule, sampling.levels(method.cut), parameters), key, sampling)

        can_start_anywhere = method.is_pure and not draft
        return LevelPlan(goal, with_starts(make, schedule, sampling) if can_start_anywhere else make(schedule), fine)

    def _calibration(self, fine: bool) -> Calibration:
        assert self._calibrations is not None
        found = self._calibrations.fine if fine else self._calibrations.coarse
        if found is None:
            raise InputError(
                f"calibration {self._calibrations.coarse.origin} has no fine reference: make one with cachec calibrate "
                "--reference-steps"
            )
        return found

    def _uncached_psnr(self) -> float:
        """How close the uncached run comes to the fine reference on the prompts to choose by, mean in dB."""
        chosen_by = self._calibration(False).of("stop")
        return self._psnr(chosen_by.latents(chosen_by.num_steps), against_fine=True)

    def _psnr(self, latents: Array, *, against_fine: bool) -> float:
        """Mean in dB over the prompts to choose by; infinite where all pictures are equal."""
        if self._decode is None:
            raise InputError("a PSNR is one of pictures, and there is nothing to decode latents with: ask for a budget")
        if against_fine not in self._references:
            chosen_by = self._calibration(against_fine).of("stop")
            final = chosen_by.latents(chosen_by.num_steps)
            self._references[against_fine] = list(self._decode(final))
        pictures = self._decode(latents)
        value = mean([psnr_db(a, b) for a, b in zip(pictures, self._references[against_fine], strict=True)]).value
        return math.inf if value is None else value
