"""Feature forecasts fitted in closed form to calibration runs: the hidden-cut variant of ``gram``.

Source: as ``gram``; on features, teacher-forced, as L2P (arXiv 2604.26365) on velocities, but for one schedule. The tail
is not linear, so an objective in velocities would be wrong: each forecast feature is regressed, step by step, on the true
features computed before it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.gram import schedule_facts
from cachec.compiler.methods.gram_fit import solve_row
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import PredictorError
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class GramHidden(TableMethod):
    """F_s = sum over all computed features so far, with fitted weights; hidden cut, a slot for each computed step.

    No order and no warm-up. The ridge of every row is cross-validated over prompts. Fitted on true features, so it does not
    know how the model answers to latents that are off; ``gram`` does. Exact on nothing.
    """

    name: ClassVar[str] = "gram-hidden"
    summary: ClassVar[str] = "feature forecasts fitted to calibration runs (ours, hidden cut)"
    needs_calibration: ClassVar[bool] = True
    schedule_bound: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        gram = calibration.feature_gram()
        rows = np.zeros((schedule.num_steps, len(schedule.compute)))
        for step in schedule.forecast:
            past = [s for s in schedule.compute if s < step]
            products = gram[:, past][:, :, past]
            rows[step, : len(past)] = solve_row(products, gram[:, past, step], gram[:, step, step])
        facts = schedule_facts(self.name, calibration, schedule)
        return Parameters({"rows": rows}, facts, calibration.origin)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        if parameters is None:
            raise PredictorError("gram-hidden needs rows fitted to calibration runs: give --calibration")
        if "rows" not in parameters.arrays:
            raise PredictorError(f"{parameters.origin} holds no rows of gram-hidden: it has {sorted(parameters.arrays)}")
        rows = parameters.arrays["rows"]
        wanted = ",".join(map(str, schedule.compute))
        if parameters.facts.get("schedule") != wanted or len(rows) != schedule.num_steps:
            raise PredictorError(
                f"rows of gram-hidden were fitted to steps {parameters.facts.get('schedule')}, wanted {wanted}"
            )
        return ForecastTable.of_rows(schedule, rows)
