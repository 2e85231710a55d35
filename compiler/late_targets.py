"""Targets that are built into a bundle when it is there without them: each in a process of its own, from the ONNX files.

What fails then, or is interrupted, costs nothing that was there before.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cachec.compiler.frontend import make_programs
from cachec.compiler.measuring import measure
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.options import as_flags
from cachec.compiler.parts import Finished
from cachec.compiler.planning.levels import check_quality
from cachec.compiler.request import Request
from cachec.engines.add_target import add_targets
from cachec.engines.build_target import device_for
from cachec.engines.targets import Fit, TargetName, find_fit
from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.engine import HOST
from cachec.runtime.errors import CachecError
from cachec.runtime.origin import load_bundle
from cachec.runtime.session import LoadedBundle
from cachec.runtime.write import BundleAdder

log = logging.getLogger(__name__)


def add_late_targets(model: LoadedModel, request: Request, root: Path, made: Sequence[Finished]) -> Bundle:
    """Build the late targets of a request into the bundle at ``root``, and measure its levels on them if they go first here.

    ``made``: its parts.

    Raises:
        CachecError: of the kind that fits; with the command that tries again. The bundle is whole without what is missing.
        QualityError: a level is below the gate on the new engines; the bundle says what was measured.
    """
    for number, name in enumerate(request.late):
        again = _again(request, root, request.late[number:])
        try:
            device = device_for(name, request.device)
            add_targets(
                root,
                [str(name)],
                device=None if device == HOST else str(device),
                max_batch=request.wish.build.max_batch,
                options=request.build,
                apart=True,
            )
        except CachecError as error:
            raise type(error)(f"{error}. {root} is whole without {name}: try again with {again}") from error
        except KeyboardInterrupt:
            log.warning("%s is whole without %s: go on with %s", root, name, again)
            raise
    bundle = Bundle.open(root)
    first = first_that_runs(request, bundle.at().manifest.targets) if request.measures else None
    if first is not None and any(name.matches(first.target) for name in request.late):
        assert first.backend is not None, "it runs"
        with load_bundle(bundle, first.target, first.backend, device=first.device) as loaded:
            found = [_measure_again(model, loaded, bundle.root, finished) for finished in made]
        for levels in found:
            check_quality(levels, request.wish.fit.min_psnr)
        return Bundle.open(root)
    return bundle


def first_that_runs(request: Request, targets: Sequence[Target]) -> Fit | None:
    """Of the targets that the request names, in its order, the first that runs on its device."""
    fits = (find_fit(one, request.device) for name in request.targets for one in targets if name.matches(one))
    return next((fit for fit in fits if fit.fits), None)


def _again(request: Request, root: Path, names: Sequence[TargetName]) -> str:
    """The command that builds these targets."""
    targets = [word for name in names for word in ("--target", str(name))]
    device = ["--device", str(request.device)] if request.device.index else []
    return shlex.join(["cachec", "add-target", str(root), *targets, *device, *as_flags(request.wish.build, "add-target")])


def _measure_again(model: LoadedModel, loaded: LoadedBundle, root: Path, finished: Finished) -> Mapping[str, Any]:
    """Let levels, and where a speed is asked for their schedules, be of these engines. All of it is kept, good or not.

    Returns the facts by level.
    """
    part, programs = finished.part, finished.programs
    request, size, steps = part.request, part.request.settings.size, part.request.settings.steps
    engines = loaded.at(size, steps).engines
    calibrations = part.calibrate(model)
    if request.wants_speed:
        programs = make_programs(model, request, engines, calibrations, part.parameters)
    levels: Mapping[str, Mapping[str, Any]] = programs.facts
    if calibrations is not None:
        levels = measure(model, request, engines, programs, calibrations)
    with BundleAdder(root) as writer:
        files = {level: writer.add_program(level, program) for level, program in programs.by_level.items()}
        writer.commit_programs(files, levels, size=size, steps=steps)
    return levels
