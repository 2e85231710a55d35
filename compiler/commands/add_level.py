"""``cachec add-level``: another level for a bundle that exists, searched, fitted and measured on its own engines.

No engine is touched: engines take any schedule of their cut, and a level is numbers only.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.conditions import load_conditions, subject_of_bundle, subject_on_grid
from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.metrics import Decode
from cachec.compiler.calibration.runs import Subject, encode_prompts
from cachec.compiler.calibration.statistics import Statistics, calibration_facts, check_statistics, load_statistics
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import CodedMethod, Method, PredictorMethod
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import settings_of
from cachec.compiler.options import ScheduleWish
from cachec.compiler.planning.goals import Goal, check_level_name, make_goals
from cachec.compiler.planning.levels import measure_levels
from cachec.compiler.planning.planner import Calibrations, Planner
from cachec.engines import open_bundle
from cachec.runtime.abi import COMPUTE
from cachec.runtime.bundle import Bundle, Manifest
from cachec.runtime.errors import InputError, OutputError, need
from cachec.runtime.inspect import describe_levels
from cachec.runtime.noise import check_seed
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.session import LoadedBundle
from cachec.runtime.write import BundleAdder

log = logging.getLogger(__name__)

USUAL = {"output": "gram", "hidden": "gram-hidden"}  # method, by cut


@dataclass(frozen=True, eq=False)
class Reference:
    """What the new level is fitted to and measured against; ``decode`` where pictures can be made."""

    subject: Subject
    decode: Decode | None


def add_level(
    root: Path,
    stats: Path,
    *,
    name: str | None = None,
    budget: int | None = None,
    target_psnr: float | None = None,
    method: str | None = None,
    options: Mapping[str, str] | None = None,
    conditions: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    force: bool = False,
) -> list[tuple[str, str]]:
    """Add a level to the bundle at ``root``, fitted to the calibration ``stats``; the bundle is as it was if that fails.

    It is for the size and the number of steps that ``stats`` are of.

    With ``conditions`` of the calibration's prompts it needs nothing but the bundle, and figures are of latents. Without, the
    bundle's model encodes prompts and makes pictures, which a ``target_psnr`` takes. Returns the rows of a short table.

    Raises:
        InputError: an option cannot be used, or the calibration is of something else.
        OutputError: the bundle has such a level and ``force`` is not given, or it cannot be written.
        QualityError: the target is out of reach.
    """
    check_seed(seed)
    if target_psnr is not None and conditions is not None:
        raise InputError("--target-psnr is of pictures, which a bundle cannot make: leave --conditions out, or give --budget")
    with BundleAdder(root) as writer:
        statistics = load_statistics(stats)
        size, steps = _place(writer.bundle.manifest, statistics.facts)
        old = writer.bundle.manifest.at(size, steps)
        chosen = _method_for(old, method, options or {})
        goal = _goal(chosen, old.settings["steps"], name, budget, target_psnr)
        if goal.level in old.programs and not force:
            raise OutputError(f"{root} has a level {goal.level} already: pass --force to replace it, or another --name")
        with open_bundle(root, device=device, size=size, steps=steps) as bundle:
            reference = _reference(bundle, conditions)
            _check_statistics(statistics, reference.subject, bundle.target.precision)
            program, facts = _make(bundle, statistics, reference, chosen, goal, seed)
        known = {**facts, "method": chosen.name, "options": chosen.options()}
        files = {**old.programs, goal.level: writer.add_program(goal.level, program)}
        levels = {**old.facts.get("levels", {}), goal.level: known}
        writer.commit_programs(files, levels, size=size, steps=steps)
    return [("bundle", str(root)), *describe_levels(Bundle.open(root).at(size, steps), only=goal.level)]


def _place(manifest: Manifest, facts: Mapping[str, str]) -> tuple[str | None, int | None]:
    """The size and number of steps of the bundle that a calibration is of; those of its first if it is of none."""
    for one in manifest.variants if manifest.more else ():
        if all(str(one.settings.get(name, 1)) == facts.get(name, "1") for name in ("width", "height", "frames", "steps")):
            return one.size, one.steps
    return None, None


def _method_for(manifest: Manifest, name: str | None, options: Mapping[str, str]) -> Method:
    """The method, if its levels are numbers that the bundle's engines take.

    Raises:
        InputError: they are not.
    """
    cut = manifest.method["cut"]
    method = get_method(USUAL[cut] if name is None else name).with_options(options)
    if manifest.method["fold"] != "static":
        raise InputError(
            "the bundle was compiled with --fold none: its predictor is inside an engine, which takes no other level"
        )
    for kind in (get_method(manifest.method["name"]), type(method)):
        if issubclass(kind, CodedMethod):
            raise InputError(f"engines of {kind.name} keep features in a code of their own: compile a bundle for each level")
    if method.cut != cut:
        raise InputError(f"{method.name} works on the {method.cut} cut, and the bundle's engines are of the {cut} cut")
    if method.needs_training or method.needs_gradients or isinstance(method, PredictorMethod):
        raise InputError(f"{method.name} takes the model's graphs to make a level of: give it to cachec compile")
    return method


def _goal(method: Method, steps: int, name: str | None, budget: int | None, target_psnr: float | None) -> Goal:
    if budget is None and target_psnr is None:
        raise InputError("nothing is asked for: give --budget or --target-psnr")
    schedule = None if budget is None else "search"
    (goal,), _ = make_goals(method, steps, ScheduleWish(schedule=schedule, budget=budget, target_psnr=target_psnr))
    level = (
        name if name is not None else f"budget-{budget}" if budget is not None else f"psnr-{target_psnr:g}".replace(".", "_")
    )
    check_level_name(level)
    return replace(goal, level=level)


def _reference(bundle: LoadedBundle, conditions: Path | None) -> Reference:
    if conditions is not None:
        return Reference(subject_of_bundle(bundle, load_conditions(conditions)), None)
    need("torch", "diffusers", "transformers", extra="compile", purpose="adding a level without --conditions")
    settings = settings_of(bundle.manifest)
    model = load_model(find_model(bundle.manifest.model["source"]), with_transformer=False)
    subject = subject_on_grid(bundle, lambda prompts: encode_prompts(model, prompts, settings))
    return Reference(subject, lambda latents: model.decode(latents, settings))


def _check_statistics(statistics: Statistics, subject: Subject, precision: str) -> None:
    """Raise ``InputError`` unless the runs are of this model and these settings, and in the engines' ``precision``.

    Runs in float32 are taken for engines of any: they are what those come near to.
    """
    exact = statistics.facts.get("precision") == "float32"
    check_statistics(statistics, calibration_facts(subject, None, precision="float32" if exact else precision))
    if exact and precision != "float32":
        log.warning("the level is fitted to runs in float32, which %s has, for engines in %s", statistics.origin, precision)
    statistics.prompts.check(("fit", "stop", "measure"), statistics.origin)


def _make(
    bundle: LoadedBundle, statistics: Statistics, reference: Reference, method: Method, goal: Goal, seed: int
) -> tuple[Program, dict[str, Any]]:
    """The level's Program, and what is known of it: how it was planned, and what was measured."""
    evaluator, uncached = EngineEvaluator.of(bundle), bundle.programs[UNCACHED]
    coarse = replace(
        statistics, fine_latents=None, fine_velocity_gram=None, fine_final=None
    )  # of noise levels that a bundle does not know
    calibrations = Calibrations.open(coarse, reference.subject, evaluator)
    planner = Planner(
        method,
        calibrations,
        sampling=reference.subject.sampling,
        decode=reference.decode,
        key=uncached.key,
        parameters=None,
        to_fine=False,
        forecast_cost=0.0,
        seed=seed,
    )
    plan = planner.plan(goal)
    programs = {UNCACHED: uncached, goal.level: plan.program}
    found = measure_levels(reference.decode, evaluator, programs, calibrations.coarse.of("measure"))
    compute = bundle.engines[COMPUTE]
    return plan.program, {**plan.facts(), **found[goal.level], "measured_by": f"{compute.name} on {compute.device.name}"}
