"""Targets that are built into a bundle when it is there without them: each in a process of its own, from the ONNX files.

What fails then, or is interrupted, costs nothing that was there before.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachec.compiler.frontend import Programs, make_programs
from cachec.compiler.measuring import measure
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.options import as_flags
from cachec.compiler.planning.levels import check_quality
from cachec.compiler.planning.planner import Calibrations
from cachec.compiler.request import Request
from cachec.engines.add_target import add_targets
from cachec.engines.build_target import device_for
from cachec.engines.targets import Fit, TargetName, find_fit
from cachec.runtime.bundle import Bundle, Target
from cachec.runtime.engine import HOST
from cachec.runtime.errors import CachecError
from cachec.runtime.session import load_bundle
from cachec.runtime.write import BundleAdder

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Made:
    """What a compilation has made and run when the bundle is written."""

    parameters: Parameters | None
    calibrations: Calibrations | None
    programs: Programs


def add_late_targets(model: LoadedModel, request: Request, root: Path, made: Made) -> Bundle:
    """Build the late targets of a request into the bundle at ``root``, and measure its levels on them if they go first here.

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
    first = first_that_runs(request, bundle.manifest.targets) if request.measures else None
    if first is not None and any(name.matches(first.target) for name in request.late):
        _measure_again(model, request, bundle, made, first)
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


def _measure_again(model: LoadedModel, request: Request, bundle: Bundle, made: Made, fit: Fit) -> None:
    """Let levels, and where a speed is asked for their schedules, be of these engines. All of it is kept, good or not."""
    assert fit.backend is not None, "it runs"
    programs = made.programs
    with BundleAdder(bundle.root) as writer:
        with load_bundle(bundle, fit.target, fit.backend, device=fit.device) as loaded:
            if request.wants_speed:
                programs = make_programs(model, request, loaded.engines, made.calibrations, made.parameters)
            levels: Mapping[str, Mapping[str, Any]] = programs.facts
            if made.calibrations is not None:
                levels = measure(model, request, loaded.engines, programs, made.calibrations)
        files = {level: writer.add_program(level, program) for level, program in programs.by_level.items()}
        writer.commit_programs(files, levels)
    check_quality(levels, request.wish.fit.min_psnr)
