"""From what a user says to a checked request."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import Method, PredictorMethod
from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.planning.goals import Goal, Wish, make_goals
from cachec.compiler.tables.schedule import Schedule
from cachec.engines import BACKENDS, get_backend
from cachec.engines.gpu import find_gpu
from cachec.engines.targets import TargetName
from cachec.passes import HOISTS
from cachec.runtime.build_options import BuildOptions, build_options
from cachec.runtime.device import CUDA, DeviceName
from cachec.runtime.engine import DEFAULTS, HOST
from cachec.runtime.errors import CachecError, InputError, unknown_name
from cachec.runtime.noise import check_seed
from cachec.runtime.sizes import USUAL_STRIDE, check_max_batch, size_ranges

log = logging.getLogger(__name__)

NUM_CALIBRATION = 32  # prompts of a calibration that compile makes itself
SLOTS = ("bfloat16", "float16", "float32")  # what features may be stored in
REFERENCE_FACTOR = 4  # steps of the fine reference, over those of the run


@dataclass(frozen=True)
class Request:
    """What to compile. ``interval`` is recorded if the schedule came from one; ``fold`` is ``--fold static``.

    ``retrain``: prompts were given, so a predictor that ships is not used. ``reference_steps`` 0: no fine reference;
    ``None``: that of the calibration file.
    ``min_psnr``: the build fails below it.
    """

    method: Method
    goals: tuple[Goal, ...]
    settings: Settings
    targets: tuple[TargetName, ...] = (TargetName("ort"),)
    device: DeviceName = HOST
    build: BuildOptions = DEFAULTS
    max_batch: int = 1
    interval: int | None = None
    predictor: Path | None = None
    calibration: Path | None = None
    reference_steps: int | None = 0
    min_psnr: float | None = None
    prompts: Sequence[str] = ()
    retrain: bool = False
    seed: int = 0
    batch: int | None = None
    fold: bool = True
    hoist: str = "all"
    velocities: bool = False
    slots: str | None = None
    verify_passes: bool = False
    dump_graphs: Path | None = None

    @property
    def schedule(self) -> Schedule | None:
        """The one fixed schedule, if nothing is searched."""
        return self.goals[0].schedule

    def options_for(self, timing: Path) -> BuildOptions:
        """What builders are asked for; kernel timings are kept in the folder ``timing``."""
        schedule, steps = self.schedule, self.settings.steps
        computed = len(schedule.compute) if schedule is not None else steps // USUAL_STRIDE
        sizes = size_ranges(steps, computed, batch=self.batch, max_batch=self.max_batch)
        return replace(self.build, sizes=sizes, timing_cache=timing)

    @property
    def fits_fine(self) -> bool:
        """Are all levels fitted to the fine reference? If one is lossless, only that one is."""
        return bool(self.reference_steps) and not any(goal.lossless for goal in self.goals)

    @property
    def wants_speed(self) -> bool:
        """Must the cost of a forecast be known to plan?"""
        return any(goal.speedup is not None for goal in self.goals)

    @property
    def needs_calibration(self) -> bool:
        """Are calibration runs looked at: for fits, searches, or a quality gate?"""
        searched = any(goal.searched for goal in self.goals)
        wished = self.min_psnr is not None or self.calibration is not None
        return self.method.needs_calibration or searched or wished


def make_request(
    spec: ModelSpec,
    *,
    method: str = "lesa",
    options: Mapping[str, str] | None = None,
    steps: int = 50,
    interval: int | None = None,
    budget: int | None = None,
    schedule: str | None = None,
    levels: str | None = None,
    target_psnr: float | None = None,
    target_speedup: float | None = None,
    min_psnr: float | None = None,
    calibration: str | Path | None = None,
    reference_steps: int | None = None,
    targets: str | Sequence[str] = "ort",
    device: str | None = None,
    max_batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    dtype: str = "float32",
    batch: int | None = None,
    predictor: str | Path | None = None,
    prompts: str | Path | None = None,
    seed: int = 0,
    fold: str = "static",
    hoist: str = "all",
    velocities: bool = False,
    slots: str | None = None,
    verify_passes: bool = False,
    dump_graphs: str | Path | None = None,
    **build: Any,
) -> Request:
    """Check all options against each other and fill in the model's defaults.

    Which steps to compute: ``interval`` (the method's published rule), ``budget`` (how many), ``levels``
    (``lossless,high,fast=30``), ``target_psnr`` in dB or ``target_speedup``; at most one. ``schedule`` is ``uniform``,
    ``interval``, ``search``, or a list of steps, ``0,1,2,9``. The default is the method's own interval; methods that are
    fitted to a schedule search one. ``calibration`` is a file from ``cachec calibrate``; ``reference_steps`` fits to a finer
    run. ``prompts`` is a file of training and calibration prompts. ``fold`` is ``static`` or ``none``,
    ``hoist`` ``none``, ``tables`` (what depends on the prompt leaves the step) or ``all`` (on the step, too). ``device`` is
    where engines are measured (by default the CPU, or the GPU if all targets are for it), and for ``aoti`` what they are built
    for. ``targets``: one or more of ``cachec list backends``;
    for TensorRT, ``max_batch`` is what a call may take, and ``build`` options are those of ``runtime.build.build_options``.
    ``velocities``: forecasts also hand out velocities, for a sampler outside (``LoadedBundle.session(for_sampler=True)``).
    ``slots`` ``float16`` or ``bfloat16`` stores features in half the memory.

    Raises:
        InputError: an option is unknown, out of range, or contradicts another.
    """
    _check_numbers(seed, batch, max_batch, min_psnr)
    names = _read_targets(targets)
    chosen = get_method(method).with_options(options or {})
    settings = make_settings(spec, height, width, text_tokens, guidance, steps, dtype)
    if predictor is not None and prompts is not None:
        raise InputError("--predictor and --prompts contradict each other: a given predictor is not trained")
    if predictor is not None and not chosen.needs_training:
        raise InputError(f"method {method!r} has no trained predictor, so --predictor {predictor} cannot be used")
    if calibration is not None and prompts is not None and not chosen.needs_training:
        raise InputError("--calibration and --prompts contradict each other: a given calibration has its prompts")
    wish = Wish(interval, budget, schedule, levels, target_psnr, target_speedup)
    goals, interval = make_goals(chosen, steps, wish)
    return Request(
        method=chosen,
        goals=goals,
        settings=settings,
        targets=names,
        device=_choose_device(device, names),
        build=build_options(**build),
        max_batch=max_batch,
        interval=interval,
        predictor=Path(predictor) if predictor else None,
        calibration=Path(calibration) if calibration else None,
        reference_steps=_choose_reference(chosen, goals, steps, reference_steps, given_file=calibration is not None),
        min_psnr=min_psnr,
        prompts=read_prompts(Path(prompts)) if prompts else default_prompts(spec.prompts, "train"),
        retrain=prompts is not None,
        seed=seed,
        batch=batch,
        fold=_check_fold(chosen, goals, fold),
        hoist=_check_hoist(hoist),
        velocities=velocities,
        slots=_check_slots(slots),
        verify_passes=verify_passes,
        dump_graphs=Path(dump_graphs) if dump_graphs else None,
    )


def make_settings(
    spec: ModelSpec,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    steps: int = 50,
    dtype: str = "float32",
) -> Settings:
    """Settings with the model's defaults filled in.

    Raises:
        InputError: one is out of range.
    """
    return Settings(
        height=spec.height if height is None else height,
        width=spec.width if width is None else width,
        text_tokens=spec.text_tokens if text_tokens is None else text_tokens,
        guidance=spec.guidance if guidance is None else guidance,
        steps=steps,
        dtype=dtype,
    )


def _check_numbers(seed: int, batch: int | None, max_batch: int, min_psnr: float | None) -> None:
    check_seed(seed)
    check_max_batch(max_batch)
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    if batch is not None and max_batch != 1:
        raise InputError(f"batch {batch} and max-batch {max_batch} contradict each other: give one")
    if min_psnr is not None and not (math.isfinite(min_psnr) and min_psnr > 0):
        raise InputError(f"min-psnr is {min_psnr}; it must be a number of dB above 0")


def _read_targets(targets: str | Sequence[str]) -> tuple[TargetName, ...]:
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise InputError("no target given: take ort, or others that cachec list backends names")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"target {', '.join(sorted(twice))} is given twice")
    return tuple(TargetName.parse(name, BACKENDS) for name in names)


def _choose_device(device: str | None, targets: Sequence[TargetName]) -> DeviceName:
    """The device to measure on: as asked for; else the first GPU, if all targets are for it and it is there, or the CPU."""
    if device is not None:
        return DeviceName.parse(device)
    if any(name.device != CUDA and get_backend(name.backend).only_device != CUDA for name in targets):
        return HOST
    try:
        find_gpu(DeviceName(CUDA))
    except CachecError as error:
        log.info("levels cannot be measured on a GPU: %s", error)
        return HOST
    return DeviceName(CUDA)


def _choose_reference(method: Method, goals: Sequence[Goal], steps: int, given: int | None, *, given_file: bool) -> int | None:
    """Steps of the fine reference; 0 if nothing is fitted to one, ``None`` for those of the calibration file."""
    if any(goal.lossless for goal in goals):
        if method.cut != "output" or not method.schedule_bound:
            raise InputError(f"level lossless is fitted to a fine reference, which {method.name} cannot be: take method gram")
        if given == 0:
            raise InputError(
                "reference-steps is 0, but level lossless is fitted to a fine reference: leave it out, or name one"
            )
        if given is None:
            return None if given_file else REFERENCE_FACTOR * steps
        return given
    if given and not (method.cut == "output" and method.schedule_bound):
        raise InputError(f"reference-steps is {given}, but {method.name} is not fitted to a reference: take method gram")
    if given and not any(goal.searched for goal in goals):
        raise InputError(
            f"reference-steps is {given}, but the schedule is given on the run's own steps: take --schedule search"
        )
    return given or 0


def _check_hoist(hoist: str) -> str:
    if hoist not in HOISTS:
        raise unknown_name("hoist", hoist, HOISTS)
    return hoist


def _check_slots(slots: str | None) -> str | None:
    if slots not in (None, *SLOTS):
        raise unknown_name("slot type", str(slots), SLOTS)
    return slots


def _check_fold(method: Method, goals: Sequence[Goal], fold: str) -> bool:
    if fold not in ("static", "none"):
        raise InputError(f"fold is {fold!r}; use static or none")
    if fold == "none" and not isinstance(method, PredictorMethod):
        raise InputError(f"fold is none, but {method.name} has no predictor graph to keep in the engine: use static")
    if fold == "none" and any(goal.searched for goal in goals):
        raise InputError("fold is none, but a searched schedule needs its forecasts as numbers: use static")
    return fold == "static"
