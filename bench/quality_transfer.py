"""Rows fitted in one setting and used in another, and steps of one branch of guidance: parts of ``bench.quality``.

Rows are those of the closed form on the steps that were searched in the usual setting: what changes is what they are fitted to.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.quality_methods import EQUAL, WHOLE_BUDGET, make_method, plan
from bench.quality_setting import Rows, Setting, calibrate
from cachec.compiler.calibration.calibration import Calibration, open_calibration
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import Subject
from cachec.compiler.calibration.uses import Use, UsedPrompts
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.methods.gram_fit import fit_rows
from cachec.compiler.models.base import Settings
from cachec.compiler.planning.goals import Goal
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.errors import InputError

TRANSFER, BRANCHES = "transfer", "branches"
SCALES = (0.5, 1.5)  # of the usual guidance
SIDE = 0.75  # of the usual one, for another resolution
MOOD = "sleepy"  # training captions that say it, all others left out
FEWER = (8, 16)  # captions to fit to
ONE_BRANCH_METHODS = ("adams:2", "gram, closed form")


def settings_elsewhere(usual: Settings) -> Mapping[str, Settings]:
    """Other settings to fit in, by what they are called."""
    found = {f"guidance {scale * usual.guidance:g}": replace(usual, guidance=scale * usual.guidance) for scale in SCALES}
    height, width = (round(SIDE * side / 32) * 32 for side in (usual.height, usual.width))
    found[f"{width}x{height}"] = replace(usual, height=height, width=width)
    return found


def bench_transfer(rows: Rows, setting: Setting) -> None:
    """Fitted elsewhere, used at the usual setting; the row fitted there is one of those at equal cost."""
    steps = rows.steps(EQUAL, WHOLE_BUDGET, "gram, closed form", "searched")
    if steps is None:
        return
    schedule = Schedule(setting.num_steps, steps)

    def measure(name: str, settings: Settings, captions: Callable[[Setting], list[str]] = _usual, seed: int = 0) -> None:
        def row() -> dict[str, Any]:
            fitted = fit_rows(calibrated_elsewhere(setting, settings, captions(setting), name, seed=seed), schedule)
            return setting.measure(setting.program(fitted))

        rows.measure(TRANSFER, WHOLE_BUDGET, "gram, closed form", name, row)

    for name, settings in settings_elsewhere(setting.settings).items():
        measure(name, settings)
    measure("other noise", setting.settings, seed=1)
    measure(f"{MOOD} only", setting.settings, _of_mood)
    for num in (count for count in FEWER if count < setting.extent.fit):
        few = setting.fit.select(range(num))
        rows.measure(
            TRANSFER, WHOLE_BUDGET, "gram, closed form", f"{num} captions",
            lambda some=few: setting.measure(setting.program(fit_rows(some, schedule))),
        )  # fmt: skip


def calibrated_elsewhere(setting: Setting, settings: Settings, captions: list[str], name: str, *, seed: int) -> Calibration:
    """A calibration in other settings or on other captions; kept in ``work`` by its ``name``."""
    subject, evaluator = Subject.of(setting.model, settings), evaluator_of(setting.model, settings, setting.device)
    uses: list[Use] = ["fit" for _ in captions]
    path = setting.work / f"elsewhere-{name.replace(' ', '-')}"
    statistics = calibrate(subject, evaluator, UsedPrompts(tuple(captions), tuple(uses)), path, seed=seed)
    return open_calibration(statistics, subject, evaluator)


def _usual(setting: Setting) -> list[str]:
    return default_prompts(setting.model.spec.prompts, "train")[: setting.extent.fit]


def _of_mood(setting: Setting) -> list[str]:
    """Training captions of one mood.

    Raises:
        InputError: there are too few.
    """
    lists = (default_prompts(setting.model.spec.prompts, use) for use in ("train", "choose"))
    found = [caption for captions in lists for caption in captions if MOOD in caption][: setting.extent.fit]
    if len(found) < setting.extent.fit // 2:
        raise InputError(f"only {len(found)} training captions say {MOOD!r}")
    return found


def bench_branches(rows: Rows, setting: Setting) -> None:
    """Of a model with two branches of guidance: steps with the positive one alone, beside whole ones at as much work."""
    if not setting.guided:
        return
    for name, schedule in one_branch_schedules(setting.num_steps).items():
        for method in ONE_BRANCH_METHODS:
            rows.measure(
                BRANCHES, WHOLE_BUDGET, method, name,
                lambda m=method, s=schedule: {
                    **setting.measure(plan(setting, make_method(setting, m), Goal(schedule=s))), "text": str(s)
                },
            )  # fmt: skip


def one_branch_schedules(num_steps: int) -> Mapping[str, Schedule]:
    """As much work as ``WHOLE_BUDGET`` whole steps, none, some or most of them of one branch."""
    more, most = WHOLE_BUDGET + 2, WHOLE_BUDGET + 4
    whole, ten, twelve = (uniform_schedule(num_steps, count).compute for count in (WHOLE_BUDGET, more, most))
    return {
        "whole": Schedule(num_steps, whole),
        "every other from the fourth on": Schedule(num_steps, ten, ten[3::2]),
        "the last ones": Schedule(num_steps, ten, ten[-4:]),
        "the last eight": Schedule(num_steps, twelve, twelve[-8:]),
    }
