"""From goals to programs: search a schedule, fit the method to it, lower.

Shapes: ``T`` steps, ``P`` prompts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cachec.compiler.calibration.calibration import Calibration, open_calibration
from cachec.compiler.calibration.metrics import Mean, mean, psnr_db
from cachec.compiler.calibration.statistics import Statistics
from cachec.compiler.methods.base import Method, Parameters
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.planning.goals import Goal, budget_for_speedup, smallest_budget
from cachec.compiler.planning.search import search_schedule
from cachec.compiler.tables.coefficients import AdvanceTable, Table
from cachec.compiler.tables.lower import lower_advance, lower_table
from cachec.compiler.tables.schedule import Schedule
from cachec.passes import Graphs
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a level became: its table on the sampler's grid, or on the fine reference's (``fine``)."""

    goal: Goal
    table: Table
    fine: bool


@dataclass(frozen=True, eq=False)
class Calibrations:
    """The same statistics against the uncached run and, where they have one, against the fine reference."""

    coarse: Calibration
    fine: Calibration | None

    @classmethod
    def open(cls, statistics: Statistics, model: LoadedModel, split: Graphs, settings: Settings) -> "Calibrations":
        fine = None
        if statistics.fine_latents is not None:
            fine = open_calibration(statistics, model, split, settings, fine=True)
        return cls(open_calibration(statistics, model, split, settings), fine)


class Planner:
    """Chooses schedules and fits a method to them. Keeps what it has found, so that goals share searches.

    ``to_fine``: fits go to the fine reference. ``forecast_cost``: a forecast's time over a computed step's.
    """

    def __init__(
        self,
        model: LoadedModel,
        method: Method,
        settings: Settings,
        calibrations: Calibrations | None,
        *,
        parameters: Parameters | None,
        to_fine: bool,
        forecast_cost: float,
        seed: int,
    ) -> None:
        self._model, self._method, self._settings, self._calibrations = model, method, settings, calibrations
        self._parameters, self._to_fine, self._forecast_cost, self._seed = parameters, to_fine, forecast_cost, seed
        self._schedules: dict[tuple[int, bool], Schedule] = {}
        self._references: dict[bool, list[Array]] = {}

    def plan(self, goal: Goal) -> Plan:
        """The table that serves a goal.

        Raises:
            QualityError: its target is out of reach.
            InputError: the budget does not fit the method, or there are too few prompts.
        """
        fine = goal.lossless or self._to_fine
        if goal.schedule is not None:
            return self._fit(goal, goal.schedule, fine=False)
        if goal.budget is not None:
            return self._fit(goal, self._search(goal.budget, fine), fine)
        if goal.speedup is not None:
            least = self._method.min_budget
            budget = budget_for_speedup(goal.speedup, self._settings.steps, self._forecast_cost, least=least)
            return self._fit(goal, self._search(budget, fine), fine)
        return self._reach(goal, fine)

    def _reach(self, goal: Goal, fine: bool) -> Plan:
        """A small budget that reaches a PSNR: by drafts, then as finished fits allow (PSNR need not grow with budgets)."""
        target = self._lossless_psnr() if goal.lossless else goal.psnr
        assert target is not None

        def reached(plan: Plan) -> float:
            value = self._psnr(plan, against_fine=goal.lossless).value
            return float("inf") if value is None else value

        def draft(budget: int) -> float:
            return reached(self._fit(goal, self._search(budget, fine), fine, draft=True))

        least = self._method.min_budget
        budget, tried = smallest_budget(draft, target, least, self._settings.steps), set[int]()
        plan = self._fit(goal, self._search(budget, fine), fine)
        while reached(plan) < target and budget < self._settings.steps:  # the draft was better by luck
            tried.add(budget)
            budget += 1
            plan = self._fit(goal, self._search(budget, fine), fine)
        while budget > least and budget - 1 not in tried:
            smaller = self._fit(goal, self._search(budget - 1, fine), fine)
            if reached(smaller) < target:
                break
            plan, budget = smaller, budget - 1
        log.info("level %s: %d computed steps reach %.2f dB", goal.level, budget, reached(plan))
        return plan

    def _search(self, budget: int, fine: bool) -> Schedule:
        if (budget, fine) not in self._schedules:
            fit, _ = self._calibration(fine).split()
            method = self._method
            parameters = self._parameters
            if method.needs_calibration and not method.schedule_bound:
                parameters = method.calibrate(fit, Schedule(fit.num_steps, (0,)))
            self._schedules[budget, fine] = search_schedule(method, fit, parameters, budget, seed=self._seed)
        return self._schedules[budget, fine]

    def _fit(self, goal: Goal, schedule: Schedule, fine: bool, *, draft: bool = False) -> Plan:
        method, parameters = self._method.draft() if draft else self._method, self._parameters
        sigmas = self._model.sampling(replace(self._settings, steps=schedule.num_steps))[0].astype(np.float64)
        if method.needs_calibration:
            fit, _ = self._calibration(fine).split()
            parameters = method.calibrate(fit, schedule)
        return Plan(goal, method.table(schedule, sigmas, parameters), fine)

    def _calibration(self, fine: bool) -> Calibration:
        assert self._calibrations is not None
        found = self._calibrations.fine if fine else self._calibrations.coarse
        if found is None:
            raise InputError(
                f"calibration {self._calibrations.coarse.origin} has no fine reference: make one with cachec calibrate "
                "--reference-steps"
            )
        return found

    def _lossless_psnr(self) -> float:
        """How close the uncached run comes to the fine reference on held-out prompts, mean in dB."""
        _, held_out = self._calibration(False).split()
        value = self._compare(held_out.latents(held_out.num_steps).numpy(), against_fine=True).value
        assert value is not None
        return value

    def _psnr(self, plan: Plan, *, against_fine: bool) -> Mean:
        _, held_out = self._calibration(plan.fine).split()
        return self._compare(held_out.run(plan.table).numpy(), against_fine=against_fine)

    def _compare(self, latents: Array, *, against_fine: bool) -> Mean:
        if against_fine not in self._references:
            _, held_out = self._calibration(against_fine).split()
            final = held_out.latents(held_out.num_steps).numpy()
            self._references[against_fine] = list(self._model.decode(final, self._settings))
        pictures = self._model.decode(latents, self._settings)
        return mean([psnr_db(a, b) for a, b in zip(pictures, self._references[against_fine], strict=True)])


def lower_plan(plan: Plan, model: LoadedModel, settings: Settings, key: ProgramKey) -> Program:
    """The program of a plan, under the goal's level."""
    steps = plan.table.schedule.num_steps
    sigmas, timesteps = model.sampling(replace(settings, steps=steps))
    key = replace(key, steps=steps, sigmas_hash=hash_sigmas(sigmas), level=plan.goal.level)
    if isinstance(plan.table, AdvanceTable):
        return lower_advance(plan.table, key, sigmas, timesteps)
    return lower_table(plan.table, key, sigmas, timesteps)


def level_facts(plan: Plan, program: Program) -> Mapping[str, object]:
    """What the manifest says of a level, before it is measured."""
    return {"goal": str(plan.goal), "computed": len(program.compute_steps), "grid": program.num_steps,
            "target": "fine reference" if plan.fine else "uncached run"}  # fmt: skip
