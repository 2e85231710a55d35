"""The story of a compilation: check, train, capture and rewrite, build, calibrate, search and fit, measure, write."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cachec.compiler.frontend import StepGraphs, make_plans, plan_graphs
from cachec.compiler.graphs.build_engines import (
    build_fastest,
    build_targets,
    load_engines,
    planned_sources,
    unfinished_weights,
    warn_unless_any_runs,
)
from cachec.compiler.graphs.costs import hoisting_facts, memory_facts
from cachec.compiler.graphs.engine_sets import choose_sets
from cachec.compiler.handed import handed_facts, pipeline_facts
from cachec.compiler.late_targets import add_late_targets
from cachec.compiler.manifest import make_manifest, varying_settings
from cachec.compiler.methods.parameters import predictor_bytes
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.parts import Finished, Part, finish, graphs_of, work_folder
from cachec.compiler.planning.estimate import estimate
from cachec.compiler.planning.room import check_compile
from cachec.compiler.request import Request
from cachec.compiler.self_contained import build_parts, capture_parts
from cachec.compiler.stages import OF_A_PART, STAGES, Clock
from cachec.engines import get_builder
from cachec.engines.build_target import check_build, device_for, keep_timing
from cachec.engines.fastest import AUTO, find_usable, none_left
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import EngineError, OutputError, QualityError
from cachec.runtime.variants import Variant
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
    stages = (*STAGES, *OF_A_PART * len(request.variants), *(["late targets"] if request.late else []))
    works = {name: work_folder(out, name) for name in ("timing", "weights")}
    with Clock(stages) as clock, ExitStack() as stack:
        with model.hashing_weights(), BundleWriter(out, force=force) as writer:
            parts = [Part.of(model, one, out, alone=not request.more) for one in request.variants]
            if not request.auto:
                check_compile(model, request.settings, request.targets, out, works["weights"], num_sizes=request.num_shapes)
            clock.lap()
            try:
                made = _compile(model, request, parts, writer, works, clock, left_out)
            except QualityError:  # another attempt asks for something else, so nothing is kept for it
                _remove(works, parts)
                raise
        stack.callback(_remove, works, parts)
        bundle = add_late_targets(model, request, out, made)
        if request.late:
            clock.lap()
    warn_unless_any_runs(bundle.manifest.targets)
    parameters = made[0].part.parameters
    return Compilation(bundle, "none needed" if parameters is None else parameters.origin, clock.seconds)


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
            weights = work_folder(out, "weights")
            check_compile(model, request.settings, [name], out, weights, num_sizes=request.num_shapes)
        except (EngineError, OutputError) as error:
            left_out[str(name)] = str(error)
    if not (usable := tuple(name for name in names if str(name) not in left_out)):
        raise none_left(left_out)
    return replace(request, targets=usable), left_out


def _remove(works: Mapping[str, Path], parts: Sequence[Part]) -> None:
    for path in (*works.values(), *(path for part in parts for path in part.works.values())):
        remove_work(path)


def _compile(
    model: LoadedModel,
    request: Request,
    parts: Sequence[Part],
    writer: BundleWriter,
    works: Mapping[str, Path],
    clock: Clock,
    left_out: Mapping[str, str],
) -> list[Finished]:
    """Everything after the checks, but for the late targets."""
    with claim_work(works["timing"], "compilation"):
        trains = any(part.checked.trains for part in parts)
        if trains:  # which takes longer than graphs made twice
            _tell_costs(model, request, plan_graphs(model, request), writer)
        parts = [part.trained(model) for part in parts]
        clock.lap()
        by_size = {size: [part for part in parts if part.request.settings.size == size] for size in request.by_size}
        graphs = graphs_of(model, list(by_size.values()))
        if not trains:
            _tell_costs(model, request, graphs[request.settings.shape_bucket][1], writer)
        clock.lap()
        plans = [make_plans(model, settings, of_it) for settings, of_it in graphs.values()]
        pieces = capture_parts(model, request)
        sets = choose_sets(model, [settings for settings, _ in graphs.values()], plans, static=request.why_static)
        clock.lap()
        unfinished = partial(unfinished_weights, model, works["weights"])
        sources = planned_sources(sets.plans, writer, request.settings.dtype, unfinished)
        options = request.options_for(works["timing"], guided=model.is_guided(request.settings)).with_axes(sets.axes)
        chosen = sets.facts
        if request.auto:
            targets, facts = build_fastest(request.targets, sources, writer, request.device, options, left_out)
            chosen[AUTO] = facts
        else:
            build = partial(build_targets, request.targets, writer=writer, device=request.device, options=options)
            targets = [build(one, late=request.late) for one in sources]
        whole = build_parts(pieces, request, writer, targets[0], options)
        clock.lap()
        made = list[Finished]()
        for some in by_size.values():
            bucket = some[0].request.settings.shape_bucket
            place = sets.place(bucket)
            with ExitStack() as stack:
                load = partial(load_engines, targets[place], sources[place], writer, stack, request.device)
                engines = load() if request.measures else {}
                made += [finish(model, part, sets.at(bucket, engines), clock) for part in some]
        first, *more = (_variant(model, one, graphs[one.part.request.settings.shape_bucket][1], writer) for one in made)
        facts = {**first.facts, "pipeline": pipeline_facts(model, request.settings, writer), **chosen}
        timing = keep_timing(writer, works["timing"])
        all_targets = [target for built in targets for target in built]
        parameters = made[0].part.parameters
        manifest = make_manifest(model, request, writer, all_targets, first.programs, parameters, timing, facts, more)
        writer.commit(replace(manifest, shapes=sets.shapes(writer), files=writer.files, **whole))
    return made


def _variant(model: LoadedModel, made: Finished, graphs: StepGraphs, writer: BundleWriter) -> Variant:
    """What the manifest says of a part, whose files go to the bundle."""
    request, parameters = made.part.request, made.part.parameters
    if parameters is not None:
        writer.add_bytes("predictor/predictor.safetensors", predictor_bytes(parameters))
    files = {level: writer.add_program(level, program) for level, program in made.programs.by_level.items()}
    facts = {
        "levels": made.levels,
        "calibration": made.calibration,
        "hoisted": hoisting_facts(graphs.plain, graphs.engine),
        "memory": memory_facts(graphs.engine),
        "handed": handed_facts(model, request.settings, writer),
    }
    return Variant(varying_settings(request), files, facts)


def _tell_costs(model: LoadedModel, request: Request, graphs: StepGraphs, writer: BundleWriter) -> None:
    """Say what it takes; raise an error if there is no room to build the late targets, which would be seen at the very end."""
    batch = request.wish.model.batch or 1
    branches = 2 if model.is_guided(request.settings) else 1
    found = estimate(
        graphs.plain,
        graphs.engine,
        model.spec,
        request.settings,
        budget=request.computed,
        batch=batch,
        branches=branches,
        work=request.work,
    )
    log.warning("plan: %s", found.short)
    for name in request.late:
        builder, device = get_builder(name.backend), device_for(name, request.device)
        builder.check_room(found.weights, writer.staging, device, request.build.only(builder.options))
