"""Measuring the Programs of a request on built engines."""

import logging
from collections.abc import Mapping
from typing import Any

from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.frontend import Programs
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.planning.levels import measure_levels
from cachec.compiler.planning.planner import Calibrations
from cachec.compiler.request import Request
from cachec.runtime.abi import COMPUTE
from cachec.runtime.engine import Engine

log = logging.getLogger(__name__)


def measure(
    model: LoadedModel, request: Request, engines: Mapping[str, Engine], programs: Programs, calibrations: Calibrations
) -> dict[str, dict[str, Any]]:
    """Facts by level: those that were known, and what is measured on prompts that nothing was fitted to.

    Raises:
        InputError: a run gives NaN or infinity.
    """
    evaluator, prompts = EngineEvaluator(engines, model.io), calibrations.coarse.of("measure")
    found = measure_levels(lambda latents: model.decode(latents, request.settings), evaluator, programs.by_level, prompts)
    by = {"measured_by": f"{engines[COMPUTE].name} on {engines[COMPUTE].device.name}"}
    levels = {level: {**programs.facts.get(level, {}), **known, **by} for level, known in found.items()}
    for goal in request.goals:
        reached = levels[goal.level]["speedup"]
        if goal.speedup is not None and reached < goal.speedup:
            log.warning("level %s: %.2f times as fast was measured, %g was asked for", goal.level, reached, goal.speedup)
    return levels
