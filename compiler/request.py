"""From what a user says to a checked request."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachec.compiler.cache_configs import schedule_options
from cachec.compiler.calibration.prompts import read_prompts
from cachec.compiler.calibration.uses import Use
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import BlockMethod, CodedMethod, Method, PredictorMethod
from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.models.lora_files import LoraFile, parse_loras
from cachec.compiler.options import (
    BuildWish,
    FitWish,
    GraphWish,
    Options,
    ScheduleWish,
    check_batch,
    make_all_settings,
    make_build_options,
    read_options,
)
from cachec.compiler.planning.goals import Goal, make_goals
from cachec.compiler.tables.schedule import Schedule
from cachec.engines import BACKENDS, get_builder, get_engine
from cachec.engines.fastest import AUTO, candidates, check_alone
from cachec.engines.gpu import find_gpu
from cachec.engines.targets import TargetName
from cachec.passes import HOISTS
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.device import CPU, CUDA, DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import CachecError, InputError, unknown_name
from cachec.runtime.noise import check_seed
from cachec.runtime.sizes import USUAL_STRIDE, check_max_batch, size_ranges

log = logging.getLogger(__name__)

FOLDS = ("static", "none")
COMPONENTS = ("all", "transformer")  # what of a pipeline is in a bundle
SLOTS = ("bfloat16", "float16", "float32")  # what features may be stored in
REFERENCE_FACTOR = 4  # steps of the fine reference, over those of the run


@dataclass(frozen=True)
class Request:
    """A wish, checked against itself and completed by the model's defaults.

    ``interval`` is recorded if the schedule came from one. ``prompts`` ``None``: those that ship; given ones mean that a
    predictor that ships is not used. ``reference_steps`` 0: no fine reference; ``None``: that of the calibration file.
    ``whole``: with text encoders and decoder. ``device`` is where engines are measured, and for ``aoti`` what they are built
    for. All of it is of the first size and number of steps; ``more`` are requests for the others.
    """

    wish: Options
    method: Method
    goals: tuple[Goal, ...]
    settings: Settings
    prompts: Sequence[str] | None
    targets: tuple[TargetName, ...]
    device: DeviceName
    build: BuildOptions
    interval: int | None
    reference_steps: int | None
    loras: tuple[LoraFile, ...] = ()
    whole: bool = False
    more: tuple["Request", ...] = ()

    @property
    def variants(self) -> tuple["Request", ...]:
        """A request for every size with every number of steps, each of that alone."""
        return replace(self, more=()), *self.more

    @property
    def by_size(self) -> dict[str, tuple["Request", ...]]:
        """The variants of each size: the same graphs serve all of one."""
        sizes = dict.fromkeys(one.settings.size for one in self.variants)
        return {size: tuple(one for one in self.variants if one.settings.size == size) for size in sizes}

    @property
    def num_shapes(self) -> int:
        """How many sizes with lengths of texts there are."""
        return len(self.by_size) * len(self.settings.by_text)

    @property
    def schedule(self) -> Schedule | None:
        """The one fixed schedule, if nothing is searched."""
        return self.goals[0].schedule

    @property
    def folds(self) -> bool:
        """Does the predictor become numbers?"""
        return self.method.folds and self.wish.graph.fold == FOLDS[0]

    @property
    def computed(self) -> int:
        """How many steps are computed: of the schedule, of the budget, or a usual number where that is yet to be found."""
        if self.schedule is not None:
            return len(self.schedule.compute)
        return self.goals[0].budget or max(1, self.settings.steps // USUAL_STRIDE)

    @property
    def work(self) -> float:
        """The same in computed steps, of which one branch of guidance is half."""
        return self.computed if self.schedule is None else self.schedule.work

    def options_for(self, timing: Path, *, guided: bool) -> BuildOptions:
        """What builders are asked for; kernel timings are kept in the folder ``timing``."""
        most, wish = max(self.variants, key=lambda one: one.settings.steps), self.wish
        batch, max_batch = wish.model.batch, wish.build.max_batch
        sizes = size_ranges(most.settings.steps, most.computed, batch=batch, max_batch=max_batch, guided=guided)
        return replace(self.build, sizes=sizes, timing_cache=timing)

    @property
    def auto(self) -> bool:
        """Is only the fastest of the targets wanted?"""
        return AUTO in self.wish.build.targets

    @property
    def why_static(self) -> str | None:
        """Why there is a set of engines for each size, if that is known before there are graphs."""
        if self.wish.build.static:
            return "asked for"
        bounded = [str(name) for name in self.targets if name not in self.late and get_builder(name.backend).bounded]
        return f"{bounded[0]} builds for one size" if bounded else None

    @property
    def late(self) -> tuple[TargetName, ...]:
        """Targets that are built when the bundle is there without them, for what they take is much, and may end a process."""
        if self.auto:
            return ()
        return tuple(name for name in self.targets if get_builder(name.backend).apart)

    @property
    def fits_fine(self) -> bool:
        """Are all levels fitted to the fine reference? If one is, only that one is."""
        return bool(self.reference_steps) and not any(goal.fine for goal in self.goals)

    @property
    def wants_speed(self) -> bool:
        """Must the cost of a forecast be known to plan?"""
        return any(goal.speedup is not None for goal in self.goals)

    @property
    def fits(self) -> bool:
        """Is anything fitted to calibration runs, or searched on them?"""
        fitted = self.method.needs_calibration and self.wish.fit.predictor is None
        return fitted or any(goal.searched for goal in self.goals)

    @property
    def uses(self) -> tuple[Use, ...]:
        """Which prompts of a calibration are run for it."""
        if not self.fits:
            return ("measure",)
        chooses = self.method.by_pictures and any(goal.schedule is None for goal in self.goals)
        return ("fit", "stop", "measure", "choose") if chooses else ("fit", "stop", "measure")

    @property
    def needs_calibration(self) -> bool:
        """Are calibration runs looked at: for fits, searches, or a quality gate?"""
        return self.fits or self.wish.fit.min_psnr is not None or self.wish.fit.calibration is not None

    @property
    def measures(self) -> bool:
        """Are engines run?"""
        return self.wants_speed or self.needs_calibration


def evaluated_in(settings: Settings, device: DeviceName) -> str:
    """The precision that the model is run in to be fitted to: float32 on the CPU, that of the settings on a GPU.

    There it has the kernels for it, and a model of real size has no room in float32.
    """
    return "float32" if device.kind == CPU else settings.dtype


def make_request(spec: ModelSpec, **given: Any) -> Request:
    """A request from options by their names, as ``cachec.compiler.options`` declares them.

    Raises:
        InputError: an option is unknown, out of range, or contradicts another.
    """
    return check_wish(spec, read_options(given))


def check_wish(spec: ModelSpec, wish: Options) -> Request:
    """Check all options against each other and fill in the defaults of the model, of the method, and of this machine.

    Raises:
        InputError: an option is out of range, or contradicts another.
    """
    _check_numbers(wish)
    targets, device = _choose_targets(wish.build)
    settings = make_all_settings(spec, wish.model)
    wish = replace(wish, schedule=_configured(wish.schedule, {one.steps for one in settings}))
    method = get_method(wish.schedule.method).with_options(wish.schedule.options or {})
    _check_files(method, wish.fit, len(settings))
    prompts = None if wish.fit.prompts is None else read_prompts(wish.fit.prompts)
    whole = _wants_all(spec, wish.build.components)
    build, loras, requests = make_build_options(wish.build), parse_loras(wish.model.lora), list[Request]()
    for one in settings:
        goals, interval = make_goals(method, one.steps, wish.schedule)
        _check_graph(method, goals, wish.graph)
        reference = _choose_reference(method, goals, one, wish.fit)
        requests.append(Request(wish, method, goals, one, prompts, targets, device, build, interval, reference, loras, whole))
    if wish.graph.fold == "none" and method.folds and len({one.steps for one in settings}) > 1:
        raise InputError(
            "fold is none, which keeps a predictor of one schedule in the engine, and several numbers of steps are asked for: "
            "use static"
        )
    if isinstance(method, CodedMethod) and method.needs_training and len({one.steps for one in settings}) > 1:
        raise InputError(f"{method.name} is trained for one number of steps, and its code is in the engines: give one")
    return replace(requests[0], more=tuple(requests[1:]))


def _wants_all(spec: ModelSpec, components: str | None) -> bool:
    if components not in (None, *COMPONENTS):
        raise unknown_name("components", str(components), COMPONENTS)
    return spec.packaged if components is None else components == COMPONENTS[0]


def _configured(wish: ScheduleWish, steps: set[int]) -> ScheduleWish:
    """The wish with what its cache configuration says, if it has one.

    Raises:
        InputError: it cannot be compiled, or something else says the same.
    """
    if wish.config is None:
        return wish
    others = ("interval", "budget", "schedule", "levels", "target_psnr", "target_speedup", "options")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(wish, name) is not None]:
        raise InputError(f"--config says which steps are computed and how, and so does {given[0]}: give one")
    if len(steps) > 1:
        raise InputError(
            f"--config is of one number of steps, and {', '.join(map(str, sorted(steps)))} are asked for: give one"
        )
    return replace(wish, **schedule_options(wish.config, *steps), config=None)


def _check_numbers(wish: Options) -> None:
    batch, max_batch, min_psnr = wish.model.batch, wish.build.max_batch, wish.fit.min_psnr
    check_seed(wish.fit.seed)
    check_max_batch(max_batch)
    check_batch(batch)
    if batch is not None and max_batch != 1:
        raise InputError(f"batch {batch} and max-batch {max_batch} contradict each other: give one")
    if min_psnr is not None and not (math.isfinite(min_psnr) and min_psnr > 0):
        raise InputError(f"min-psnr is {min_psnr}; it must be a number of dB above 0")


def _check_files(method: Method, wish: FitWish, num: int) -> None:
    """``num``: of sizes with numbers of steps."""
    for name in ("predictor", "calibration"):
        one_for_all = name == "predictor" and not method.folds
        if num > 1 and getattr(wish, name) is not None and not one_for_all:
            raise InputError(f"--{name} is of one size and one number of steps, and {num} are asked for: leave it out")
    if wish.predictor is not None and wish.prompts is not None:
        raise InputError("--predictor and --prompts contradict each other: a given predictor is not trained")
    if wish.predictor is not None and not method.needs_training and method.released is None:
        raise InputError(f"method {method.name!r} has no trained predictor, so --predictor {wish.predictor} cannot be used")
    if wish.calibration is not None and wish.prompts is not None and not method.needs_training:
        raise InputError("--calibration and --prompts contradict each other: a given calibration has its prompts")


def _choose_targets(wish: BuildWish) -> tuple[tuple[TargetName, ...], DeviceName]:
    """The targets, all that can be looked at for ``auto``, and the device to measure on."""
    if AUTO not in wish.targets:
        targets = _read_targets(wish.targets)
        return targets, _choose_device(wish.device, targets)
    check_alone(wish.targets)
    device = _choose_device(wish.device, ())
    return candidates(device), device


def _read_targets(names: tuple[str, ...]) -> tuple[TargetName, ...]:
    if not names:
        raise InputError("no target given: take ort, or others that cachec list backends names")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"target {', '.join(sorted(twice))} is given twice")
    return tuple(TargetName.parse(name, BACKENDS) for name in names)


def _choose_device(device: str | None, targets: Sequence[TargetName]) -> DeviceName:
    """The device to measure on: as asked for; else the first GPU, if all targets are for it and it is there, or the CPU."""
    if device is not None:
        return DeviceName.parse(device)
    if any(name.device != CUDA and get_engine(name.backend).only_device != CUDA for name in targets):
        return HOST
    try:
        find_gpu(DeviceName(CUDA))
    except CachecError as error:
        log.info("levels cannot be measured on a GPU: %s", error)
        return HOST
    return DeviceName(CUDA)


def _choose_reference(method: Method, goals: Sequence[Goal], settings: Settings, wish: FitWish) -> int | None:
    """Steps of the fine reference; 0 if nothing is fitted to one, ``None`` for those of the calibration file."""
    given, steps = wish.reference_steps, settings.steps
    if settings.sigmas is not None and (given or any(goal.fine for goal in goals)):
        raise InputError(
            "a fine reference has the sampler's own noise levels, which do not meet those of --sigmas: leave one out"
        )
    if any(goal.fine for goal in goals):
        if method.cut != "output" or not method.schedule_bound:
            raise InputError(f"level fine is fitted to a fine reference, which {method.name} cannot be: take method gram")
        if given == 0:
            raise InputError("reference-steps is 0, but level fine is fitted to a fine reference: leave it out, or name one")
        if given is None:
            return REFERENCE_FACTOR * steps if wish.calibration is None else None
        return given
    if given and not (method.cut == "output" and method.schedule_bound):
        raise InputError(f"reference-steps is {given}, but {method.name} is not fitted to a reference: take method gram")
    if given and not any(goal.searched for goal in goals):
        raise InputError(
            f"reference-steps is {given}, but the schedule is given on the run's own steps: take --schedule search"
        )
    return given or 0


def _check_graph(method: Method, goals: Sequence[Goal], wish: GraphWish) -> None:
    if wish.hoist not in HOISTS:
        raise unknown_name("hoist", wish.hoist, HOISTS)
    if wish.slots not in (None, *SLOTS):
        raise unknown_name("slot type", str(wish.slots), SLOTS)
    if wish.fold not in FOLDS:
        raise InputError(f"fold is {wish.fold!r}; use {' or '.join(FOLDS)}")
    if wish.fold == "none" and not isinstance(method, PredictorMethod | BlockMethod):
        raise InputError(f"fold is none, but {method.name} has no predictor graph to keep in the engine: use static")
    if any(goal.searched for goal in goals) and not method.folds:
        raise InputError(f"a searched schedule needs its forecasts as numbers, which {method.name} has none of: name the steps")
    if wish.fold == "none" and any(goal.searched for goal in goals):
        raise InputError("fold is none, but a searched schedule needs its forecasts as numbers: use static")
