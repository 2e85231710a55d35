"""Rows fitted in closed form to calibration runs: this project's own method.

Source: "calibration in the Gram domain" of this repository's README. It is a linear multistep solver with free
coefficients, as BNS (arXiv 2403.01329) and S4S (arXiv 2502.17423), but fitted by least squares, node by node, on latents
that its own rows led to, and on a schedule chosen for it (``compiler/planning/pictured.py``); then all rows and time steps are
polished together by Gauss-Newton.
"""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.gram_fit import fit_rows, polish
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

POLISH_PROMPTS = 32
FIRST_PROMPTS = 16  # of the first round, which has the longest way to go
MIN_POLISH_PROMPTS = 16  # with fewer, rows and time steps fit these prompts alone
MAX_POLISHED = 12  # computed steps
CHOICES = ("pictures", "latents")
TIMES = ("sampler", "free")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gram(TableMethod):
    """x at the next node = x_T + sum of all computed velocities so far, with fitted weights; output cut, a slot for each.

    No order and no warm-up: one computed step is enough to begin. The displacement from the noise is regressed on every
    velocity, so each row also repairs what earlier ones missed. ``polish`` is the number of Gauss-Newton rounds on rows and
    time steps (0: the closed form alone; there is none above 12 computed steps, nor below 16 fitted prompts). ``choose``
    says what schedules are chosen by: pictures, for the worst ones' sake, where there are prompts to choose by
    (``compiler/planning/pictured.py``), or errors of latents. ``times``: what the model is told before the polish, the
    sampler's times, or free ones that are fitted with the rows, node by node. Fitted to one model, sampler and schedule; of no
    use for others, and no better than its calibration prompts are typical. Exact on nothing.
    """

    name: ClassVar[str] = "gram"
    summary: ClassVar[str] = "rows and time steps fitted to calibration runs (ours)"
    cut: ClassVar[Cut] = "output"
    needs_calibration: ClassVar[bool] = True
    schedule_bound: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7
    polish: int = 2
    choose: str = "pictures"
    times: str = "sampler"

    def __post_init__(self) -> None:
        if self.polish < 0:
            raise InputError(f"polish is {self.polish}; it counts rounds, 0 for none")
        if self.choose not in CHOICES:
            raise InputError(f"choose is {self.choose!r}; a schedule is chosen by {' or '.join(CHOICES)}")
        if self.times not in TIMES:
            raise InputError(f"times is {self.times!r}; what the model is told at first is {' or '.join(TIMES)}")

    @property
    def by_pictures(self) -> bool:
        return self.choose == "pictures"

    def draft(self) -> "Gram":
        return replace(self, polish=0, times=TIMES[0])

    def brief(self) -> "Gram":
        return replace(self, polish=min(self.polish, 1))

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        return self._polished(calibration, fit_rows(calibration, schedule, free_times=self.times == "free"), range(self.polish))

    def finish(self, calibration: Calibration, schedule: Schedule, begun: Parameters) -> Parameters:
        rest = range(self.brief().polish, self.polish)
        return self._polished(calibration, fitted_table(self.name, schedule, begun), rest) if rest else begun

    def _polished(self, calibration: Calibration, table: AdvanceTable, rounds: range) -> Parameters:
        """Rows and time steps after these rounds, if there may be any."""
        schedule = table.schedule
        if rounds and len(schedule.compute) > MAX_POLISHED:
            log.warning("%d computed steps are not polished: that takes a cubic number of evaluations", len(schedule.compute))
        elif rounds and calibration.num_prompts < MIN_POLISH_PROMPTS:
            log.warning("fitted on %d prompts, not polished: that takes %d", calibration.num_prompts, MIN_POLISH_PROMPTS)
        else:
            for number in rounds:
                table = polish_round(calibration, table, number)
        arrays = {"rows": table.coefficients}
        if table.timesteps is not None:
            arrays["timesteps"] = table.timesteps
        return Parameters(arrays, schedule_facts(self.name, calibration, schedule), calibration.origin)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> AdvanceTable:
        return fitted_table(self.name, schedule, parameters)


def polish_round(calibration: Calibration, table: AdvanceTable, number: int) -> AdvanceTable:
    """One round, the first of which is number 0: that one looks at fewer prompts."""
    num = min(POLISH_PROMPTS if number else FIRST_PROMPTS, calibration.num_prompts)
    return polish(calibration.select(range(num)), table, rounds=1)


def schedule_facts(name: str, calibration: Calibration, schedule: Schedule) -> dict[str, str]:
    """What fitted rows were fitted to."""
    return {
        "method": name,
        "steps": str(schedule.num_steps),
        "schedule": ",".join(map(str, schedule.compute)),
        "num_prompts": str(calibration.num_prompts),
        "target": "fine reference" if calibration.fine else "uncached run",
    }


def fitted_table(name: str, schedule: Schedule, parameters: Parameters | None) -> AdvanceTable:
    """The table that :meth:`Gram.calibrate` (or BNS) left in ``parameters``.

    Raises:
        PredictorError: there are none, or they were fitted to another schedule.
    """
    if parameters is None:
        raise PredictorError(f"{name} needs rows fitted to calibration runs: give --calibration, or let compile make one")
    wanted = ",".join(map(str, schedule.compute))
    if parameters.facts.get("schedule") != wanted or parameters.facts.get("steps") != str(schedule.num_steps):
        raise PredictorError(
            f"rows of {name} were fitted to steps {parameters.facts.get('schedule')} of {parameters.facts.get('steps')}, "
            f"wanted {wanted} of {schedule.num_steps}: fit them to this schedule"
        )
    rows = parameters.arrays.get("rows")
    if rows is None or rows.shape != (len(schedule.compute),) * 2:
        raise PredictorError(f"{parameters.origin} holds no rows of {name} for {len(schedule.compute)} computed steps")
    return AdvanceTable(schedule, rows, parameters.arrays.get("timesteps"))
