"""The story of a compilation: check, train, capture and rewrite, build, calibrate, search and fit, measure, write."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cachec.compiler.frontend import (
    Checked,
    StepGraphs,
    check,
    find_calibrations,
    find_parameters,
    make_graphs,
    make_plans,
    make_programs,
    plan_graphs,
)
from cachec.compiler.graphs.build_engines import (
    PlannedSources,
    build_fastest,
    build_targets,
    load_engines,
    unfinished_weights,
    warn_unless_any_runs,
)
from cachec.compiler.graphs.costs import hoisting_facts, memory_facts
from cachec.compiler.handed import handed_facts, pipeline_facts
from cachec.compiler.late_targets import Made, add_late_targets
from cachec.compiler.manifest import make_manifest
from cachec.compiler.measuring import measure
from cachec.compiler.methods.parameters import predictor_bytes
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.planning.estimate import estimate
from cachec.compiler.planning.levels import check_quality
from cachec.compiler.planning.room import check_calibration, check_compile
from cachec.compiler.request import Request
from cachec.compiler.stages import STAGES, Clock
from cachec.engines import get_builder
from cachec.engines.build_target import check_build, device_for, keep_timing
from cachec.engines.fastest import AUTO, find_usable, none_left
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import EngineError, OutputError, QualityError
from cachec.runtime.work import claim_work, remove_work
from cachec.runtime.write import BundleWriter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compilation:
    """What a compilation says besides the bundle: ``seconds`` by stage, and where trained parameters come from."""

    bundle: Bundle
    predictor_origin: str
    seconds: Mapping[str, float]


def compile_bundle(model: LoadedModel, request: Request, out: Path, *, force: bool = False) -> Compilation:
    """Compile ``model`` into a bundle at ``out``.

    Raises:
        CachecError: of the kind that fits; ``out`` is then as it was, or a bundle that lacks only targets which are built late.
    """
    request, left_out = check_targets(model, request, out)
    with Clock((*STAGES, *(["late targets"] if request.late else []))) as clock:
        with model.hashing_weights(), BundleWriter(out, force=force) as writer:
            checked = check(model, request)
            works = _works(out, checked)
            if not request.auto:
                check_compile(model, request.settings, request.targets, out, works["weights"])
            if checked.prompts is not None:
                fine, num = request.reference_steps or 0, len(checked.prompts.prompts)
                check_calibration(model, request.settings, num, fine, works["calibration"])
            clock.lap()
            try:
                made = _compile(model, request, checked, writer, works, clock, left_out)
            except QualityError:  # another attempt asks for something else, so nothing is kept for it
                _remove(works)
                raise
        _remove(works)
        bundle = add_late_targets(model, request, out, made)
        if request.late:
            clock.lap()
    warn_unless_any_runs(bundle.manifest.targets)
    return Compilation(bundle, "none needed" if made.parameters is None else made.parameters.origin, clock.seconds)


def check_targets(model: LoadedModel, request: Request, out: Path) -> tuple[Request, dict[str, str]]:
    """The request with the targets that can be built here. Where the fastest is wanted, the others are left out, with reasons.

    Raises:
        InputError: a target that is asked for cannot be built, or none of them all.
        EngineError: there is no room for any.
    """
    dtypes = {request.settings.dtype, request.wish.graph.slots or request.settings.dtype}
    most, left_out = request.wish.build.max_batch, dict[str, str]()
    if not request.auto:
        for dtype in dtypes:
            check_build(request.targets, dtype, request.device, request.build, max_batch=most)
        return request, left_out
    names, left_out = find_usable(request.targets, dtypes, request.device, request.build, max_batch=most)
    for name in names:
        try:
            check_compile(model, request.settings, [name], out, _work(out, "weights"))
        except (EngineError, OutputError) as error:
            left_out[str(name)] = str(error)
    if not (usable := tuple(name for name in names if str(name) not in left_out)):
        raise none_left(left_out)
    return replace(request, targets=usable), left_out


def _works(out: Path, checked: Checked) -> dict[str, Path]:
    """Folders beside the bundle, from which the same compilation goes on if this one is interrupted."""
    used = {"timing": True, "weights": True, "training": checked.trains, "calibration": checked.prompts is not None}
    return {name: _work(out, name) for name, is_used in used.items() if is_used}


def _work(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}")


def _remove(works: Mapping[str, Path]) -> None:
    for path in works.values():
        remove_work(path)


def _compile(
    model: LoadedModel,
    request: Request,
    checked: Checked,
    writer: BundleWriter,
    works: Mapping[str, Path],
    clock: Clock,
    left_out: Mapping[str, str],
) -> Made:
    """Everything after the checks, but for the late targets."""
    with ExitStack() as stack:
        stack.enter_context(claim_work(works["timing"], "compilation"))
        if checked.trains:  # which takes longer than graphs made twice
            _tell_costs(model, request, plan_graphs(model, request), writer)
        parameters = find_parameters(model, request, checked, works.get("training"))
        clock.lap()
        graphs = make_graphs(model, request, parameters)
        if not checked.trains:
            _tell_costs(model, request, graphs, writer)
        clock.lap()
        plans = make_plans(model, request, graphs)
        clock.lap()
        unfinished = partial(unfinished_weights, model, works["weights"])
        sources = PlannedSources(plans, writer, request.settings.dtype, request.settings.shape_bucket, unfinished)
        options, chosen = request.options_for(works["timing"]), {}
        if request.auto:
            targets, chosen[AUTO] = build_fastest(request.targets, sources, writer, request.device, options, left_out)
        else:
            targets = build_targets(request.targets, sources, writer, request.device, options, late=request.late)
        engines = load_engines(targets, sources, writer, stack, request.device) if request.measures else {}
        clock.lap()
        calibrations = find_calibrations(model, request, checked, works.get("calibration"))
        clock.lap()
        programs = make_programs(model, request, engines, calibrations, parameters)
        clock.lap()
        levels = programs.facts if calibrations is None else measure(model, request, engines, programs, calibrations)
        check_quality(levels, request.wish.fit.min_psnr)
        clock.lap()
        files = {level: writer.add_program(level, program) for level, program in programs.by_level.items()}
        if parameters is not None:
            writer.add_bytes("predictor/predictor.safetensors", predictor_bytes(parameters))
        facts = {
            "levels": levels,
            "calibration": {} if calibrations is None else calibrations.facts,
            "hoisted": hoisting_facts(graphs.plain, graphs.engine),
            "memory": memory_facts(graphs.engine),
            "handed": handed_facts(model, request.settings, writer),
            "pipeline": pipeline_facts(model, request.settings, writer),
            **chosen,
        }
        timing = keep_timing(writer, works["timing"])
        writer.commit(make_manifest(model, request, writer, targets, files, parameters, timing, facts))
    return Made(parameters, calibrations, programs)


def _tell_costs(model: LoadedModel, request: Request, graphs: StepGraphs, writer: BundleWriter) -> None:
    """Say what it takes; raise an error if there is no room to build the late targets, which would be seen at the very end."""
    batch = request.wish.model.batch or 1
    found = estimate(graphs.plain, graphs.engine, model.spec, request.settings, budget=request.computed, batch=batch)
    log.warning("plan: %s", found.short)
    for name in request.late:
        builder, device = get_builder(name.backend), device_for(name, request.device)
        builder.check_room(found.weights, writer.staging, device, request.build.only(builder.options))
