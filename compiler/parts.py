"""One size with one number of steps on its way through a compilation: a bundle may be for several.

Engines are built for each size, over one weights file. What is trained, fitted and measured is so for each part on its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cachec.compiler.frontend import (
    Checked,
    Programs,
    StepGraphs,
    check,
    find_calibrations,
    find_parameters,
    make_graphs,
    make_programs,
)
from cachec.compiler.measuring import measure
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.planning.levels import check_quality
from cachec.compiler.planning.planner import Calibrations
from cachec.compiler.planning.room import check_calibration
from cachec.compiler.request import Request
from cachec.compiler.stages import Clock
from cachec.runtime.engine import Engine


@dataclass(frozen=True, eq=False)
class Part:
    """What was asked for, for one size and number of steps, and what is known of it.

    ``works``: folders beside the bundle, from which the same compilation goes on if this one is interrupted.
    """

    request: Request
    checked: Checked
    works: Mapping[str, Path]
    parameters: Parameters | None = None

    @classmethod
    def of(cls, model: LoadedModel, request: Request, out: Path, *, alone: bool) -> "Part":
        """Check a request, and whether there is room. ``alone``: the bundle at ``out`` has no others.

        Raises:
            CachecError: of the kind that fits.
        """
        checked, settings = check(model, request), request.settings
        used = {"training": checked.trains, "calibration": checked.prompts is not None}
        ending = "" if alone else f"-{settings.size}-{settings.steps}"
        works = {name: work_folder(out, f"{name}{ending}") for name, is_used in used.items() if is_used}
        if checked.prompts is not None:
            check_calibration(model, settings, checked.prompts, request.reference_steps or 0, works["calibration"])
        return cls(request, checked, works)

    def trained(self, model: LoadedModel) -> "Part":
        """With the method's parameters, if it has any: found, or trained now."""
        return replace(self, parameters=find_parameters(model, self.request, self.checked, self.works.get("training")))

    def calibrate(self, model: LoadedModel) -> Calibrations | None:
        """Calibration runs, if anything needs them; they are made once, and read again from their folder."""
        return find_calibrations(model, self.request, self.checked, self.works.get("calibration"), self.parameters)


def work_folder(out: Path, name: str) -> Path:
    """A folder beside the bundle at ``out``."""
    return out.with_name(f"{out.name}.{name}")


def graphs_of(model: LoadedModel, sizes: Sequence[Sequence[Part]]) -> dict[str, tuple[Settings, StepGraphs]]:
    """By bucket the graphs of each size, of which all parts are given, with each length of texts, the longest first.

    They weigh rows on their own if some part has numbers for each branch of guidance: all its Programs play on them.
    """
    by_row = any(part.request.method.weighs_rows(part.parameters) for parts in sizes for part in parts)
    make = partial(make_graphs, model, by_row=by_row)
    return {
        settings.shape_bucket: (settings, make(replace(part.request, settings=settings), part.parameters))
        for part, *_ in sizes
        for settings in part.request.settings.by_text
    }


@dataclass(frozen=True, eq=False)
class Finished:
    """A part with its Programs, facts by level, and facts of its calibration."""

    part: Part
    programs: Programs
    levels: Mapping[str, Mapping[str, Any]]
    calibration: Mapping[str, str]


def finish(model: LoadedModel, part: Part, engines: Mapping[str, Engine], clock: Clock) -> Finished:
    """Calibrate, search and fit, and measure on ``engines``, if there are any.

    Raises:
        QualityError: a goal is out of reach, or a level below the gate.
    """
    request = part.request
    calibrations = part.calibrate(model)
    clock.lap()
    programs = make_programs(model, request, engines, calibrations, part.parameters)
    clock.lap()
    levels = programs.facts if calibrations is None else measure(model, request, engines, programs, calibrations)
    check_quality(levels, request.wish.fit.min_psnr)
    clock.lap()
    return Finished(part, programs, levels, {} if calibrations is None else calibrations.facts)
