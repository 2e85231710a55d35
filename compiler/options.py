"""Everything that can be asked of a compilation, each option once: its name, type, default, help, and who takes it.

The command line makes its flags of these declarations; in Python the same names are keywords (``cachec.compile_model``).
"""

import math
import operator
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cachec.compiler.models.base import ModelSpec, Settings
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.own_levels import check_sigmas
from cachec.runtime.variants import PictureSize

Command = Literal["compile", "train", "distill", "calibrate", "eval", "encode", "plan", "add-target"]

RUNS: tuple[Command, ...] = ("train", "calibrate", "plan")  # besides compile, for options of whole runs
SIZES: tuple[Command, ...] = (*RUNS, "distill", "encode")  # and for those of what goes in
BY_PROMPT: tuple[Command, ...] = ("train", "calibrate", "eval")  # what runs many prompts that know nothing of each other


def option(
    default: Any,
    help: str,  # noqa: A002
    *flags: str,
    also: tuple[Command, ...] = (),
    only: tuple[Command, ...] = (),
    metavar: str | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a group. ``flags``: others than ``--its-name``.

    ``also``: commands that take it besides ``compile``; ``only``: those that take it where ``compile`` does not. ``read``: of
    one that is a list in one text, with commas.
    """
    about = {"help": help, "flags": flags, "commands": only or ("compile", *also), "metavar": metavar, "read": read}
    return field(default=default, metadata=about)


def read_counts(value: Any) -> tuple[int, ...]:
    """Whole numbers, from one, several, or ``20,28,50``. Raises ``ValueError`` or ``TypeError`` if they are none."""
    if isinstance(value, str):
        return tuple(map(int, value.split(",")))
    several = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(one, bool) for one in several):
        raise TypeError("True and False are no numbers")
    return tuple(map(operator.index, several))


def read_levels(value: Any) -> tuple[tuple[float, ...], ...]:
    """Lists of numbers, of one or several, or ``1,0.75,0.5;1,0.4``. Raises ``ValueError`` or ``TypeError`` if they are none."""
    lists = [text.split(",") for text in value.split(";")] if isinstance(value, str) else list(value)
    if lists and not isinstance(lists[0], list | tuple):
        lists = [lists]
    return tuple(tuple(map(float, one)) for one in lists)


def read_sizes(value: Any) -> tuple[PictureSize, ...] | Literal["all"]:
    """Sizes, from one, several, ``832x1216,1024x1024``, or ``all``. Raises ``InputError`` or ``TypeError`` if they are none."""
    if isinstance(value, str):
        return "all" if value == "all" else tuple(map(PictureSize.parse, value.split(",")))
    several = value if isinstance(value, list | tuple) else (value,)
    if wrong := [one for one in several if not isinstance(one, str | PictureSize)]:
        raise TypeError(f"{wrong[0]} is no size")
    return tuple(one if isinstance(one, PictureSize) else PictureSize.parse(one) for one in several)


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and precision; ``None`` is what the model's family says."""

    steps: tuple[int, ...] | None = option(
        None, "Sampling steps; compile takes several, as 20,28,50; default from the model.",
        also=RUNS, metavar="N[,N]", read=read_counts,
    )  # fmt: skip
    sigmas: tuple[tuple[float, ...], ...] | None = option(
        None, "Noise levels to step over, as the pipeline's call takes them; compile takes several lists, with semicolons.",
        also=RUNS, metavar="S,S,…[;S,…]", read=read_levels,
    )  # fmt: skip
    height: int | None = option(None, "Pixels; default from the model.", also=SIZES)
    width: int | None = option(None, "Pixels; default from the model.", also=SIZES)
    frames: int | None = option(None, "Frames of a video; default from the model.", also=SIZES)
    size: tuple[PictureSize, ...] | Literal["all"] | None = option(
        None, "Width and height, and frames of a video, as 832x480x81; compile takes several, or all that the family lists.",
        also=SIZES, metavar="WxH[xF][,…]", read=read_sizes,
    )  # fmt: skip
    text_tokens: tuple[int, ...] | None = option(
        None, "Length of the text sequence; compile takes several, as 64,512, where padding is masked; default from the model.",
        also=SIZES, metavar="N[,N]", read=read_counts,
    )  # fmt: skip
    guidance: float | None = option(None, "Guidance scale; default from the model.", also=SIZES)
    true_cfg_scale: float = option(
        1.0, "Scale of true guidance, with a negative prompt, beside an embedded one (FLUX.1, HunyuanVideo).", also=SIZES
    )
    dtype: str = option("float32", "float32, float16 or bfloat16.", also=RUNS)
    cut: str | None = option(None, "Path of the block behind which forecasts begin; default the model's last.", also=RUNS)
    lora: tuple[str, ...] = option(
        (), "LoRA to fuse with the weights, by default at scale 1. May be given several times.",
        also=("train", "calibrate"), metavar="FILE[:SCALE]",
    )  # fmt: skip
    batch: int | None = option(None, "Accept batches of this size only; default any.", also=("plan",))


@dataclass(frozen=True)
class ScheduleWish:
    """The method, and which steps to compute: at most one of interval, budget, a list of steps, levels and targets."""

    method: str = option("lesa", "Forecasting method: cachec list methods.", also=("train", "plan"))
    options: Mapping[str, str] | None = option(
        None, "Option of the method, as order=2.", "--set", also=("train", "plan"), metavar="K=V"
    )
    interval: int | None = option(None, "Compute every N-th step, by the method's published rule.", also=("train",))
    budget: int | None = option(
        None, "Compute K steps: searched for fitted methods, else evenly spread.", also=("train", "plan")
    )
    schedule: str | None = option(
        None,
        "uniform, interval, search, a published one (cachec list schedules), or the steps to compute, as 0,1,2,9,16; "
        "9c: one branch of guidance.",
        also=("train", "plan"),
    )
    levels: str | None = option(None, "Several levels in one bundle: fine,high,balanced,fast, or a PSNR in dB each: fast=30.")
    target_psnr: float | None = option(None, "As few computed steps as reach this PSNR in dB against the uncached run.")
    target_speedup: float | None = option(None, "As many computed steps as leave the loop this many times as fast.")
    config: Path | None = option(None, "A cache-dit YAML with a steps mask, in place of a method and a schedule.")


@dataclass(frozen=True)
class FitWish:
    """What methods are fitted to, and how good they must be."""

    prompts: Path | None = option(
        None,
        "Training and calibration prompts, one a line; a default list ships.",
        also=("train", "distill", "calibrate", "encode"),
    )
    seed: int = option(0, "Of the noise that fits and searches see.", also=("train", "distill", "calibrate"))
    predictor: Path | None = option(None, "Trained predictor file, from cachec train.")
    calibration: Path | None = option(None, "File from cachec calibrate; default: made now.")
    reference_steps: int | None = option(None, "Fit to a finer run with so many steps.", also=("calibrate",))
    min_psnr: float | None = option(None, "Fail if a level is below this PSNR in dB on held-out prompts.")


@dataclass(frozen=True)
class BuildWish:
    """What is built, and for which machine."""

    targets: tuple[str, ...] = option(
        ("ort",), "What to build: cachec list backends; bound to a device as ort-cuda. May be given several times. "
        "auto: build and time all that run on the device, and keep the fastest.",
        "--target", "--backend",
    )  # fmt: skip
    components: str | None = option(
        None,
        "all: text encoders, tokenizers and decoder, too, so that the bundle makes pictures of prompts without torch; or "
        "transformer. Default all for models that ship, else transformer.",
    )
    static: bool = option(False, "A set of engines for each size, where one could serve all.")
    device: str | None = option(
        None, "cpu, cuda or cuda:1: run the model and measure there, aoti builds for it; default cpu, or cuda for its targets.",
        also=("train", "distill", "calibrate"),
    )  # fmt: skip
    strip_weights: bool = option(
        False, "TensorRT: engines without weights, which the bundle then has once.", also=("add-target",)
    )
    refittable: bool = option(
        False, "TensorRT: engines that take a bundle's further weights (add-weights), slower.", also=("add-target",)
    )
    hardware_compatibility: str = option(
        "none", "TensorRT: none, same-capability or ampere-plus: also run on other GPUs, slower.", also=("add-target",)
    )
    version_compatible: bool = option(False, "TensorRT: also run on later minor versions, slower.", also=("add-target",))
    optimization_level: int = option(3, "TensorRT: 0 builds fast, 5 searches longest.", also=("add-target",))
    workspace: float | None = option(
        None, "TensorRT: scratch memory of kernels, in GB; default all that there is.", also=("add-target",)
    )
    max_batch: int = option(1, "TensorRT: samples that a call may take.", also=("add-target",))


@dataclass(frozen=True)
class WorkersWish:
    """Who runs the prompts; by default this process does."""

    workers: str | None = option(
        None, "Run the prompts on Ray: ray on this machine, or ray:HOST:PORT on that cluster.",
        only=BY_PROMPT, metavar="ray[:ADDRESS]",
    )  # fmt: skip
    devices: str | None = option(
        None, "Run the prompts in a process for each device, as cuda:0,cuda:1.", only=BY_PROMPT, metavar="A,B"
    )


@dataclass(frozen=True)
class DistillWish:
    """What a student is to be like, and how it is trained."""

    distilled_steps: int = option(8, "Steps that the student is to take.", "--steps", only=("distill",))
    teacher_steps: int | None = option(None, "Steps of the model's own runs; default from the model.", only=("distill",))
    restrict: float = option(
        0.2, "The longest interval that it learns, of the noise levels from 1 to 0; 1 is plain MeanFlow.", only=("distill",)
    )
    updates: int = option(2000, "How often its weights are changed.", only=("distill",))
    distilled_batch: int = option(4, "Samples of an update.", "--batch", only=("distill",))
    rate: float = option(1e-5, "Learning rate, between the first hundred updates and the last 40 %.", only=("distill",))
    derivative: str = option(
        "difference", "Along the flow: difference, over 0.05 of noise level to either side, or exact, forward-mode AD.",
        only=("distill",),
    )  # fmt: skip


@dataclass(frozen=True)
class GraphWish:
    """What the graphs are like."""

    fold: str = option("static", "static, or none: keep the predictor in the engine.")
    hoist: str = option("all", "What leaves the steps: none, tables, all.")
    slots: str | None = option(None, "Store features as float16 or bfloat16: half the memory, some rounding.")
    velocities: bool = option(True, "Do not hand out velocities, which a sampler outside needs.", "--no-velocities")
    verify_passes: bool = option(False, "Compare the graphs with eager after each pass.")
    dump_graphs: Path | None = option(None, "Write the readable graph after each pass.", metavar="DIR")


@dataclass(frozen=True)
class Options:
    """All groups."""

    model: ModelSettings = ModelSettings()
    schedule: ScheduleWish = ScheduleWish()
    fit: FitWish = FitWish()
    build: BuildWish = BuildWish()
    graph: GraphWish = GraphWish()
    workers: WorkersWish = WorkersWish()
    distill: DistillWish = DistillWish()


def declared(command: Command) -> Iterator[tuple[str, Field[Any], Any]]:
    """The group's name, the field and the type of every option that a command takes, in the order of declaration."""
    for group in fields(Options):
        types = typing.get_type_hints(group.type)
        for one in fields(group.type):  # type: ignore[arg-type]
            if command in one.metadata["commands"]:
                yield group.name, one, types[one.name]


def read_options(given: Mapping[str, Any], command: Command = "compile") -> Options:
    """Options by their names, put into their groups; files may be strings, and a single target, too.

    Raises:
        InputError: the command has no such option, with the nearest name; or a value is not of its type.
    """
    known = {one.name: (group, one, kind) for group, one, kind in declared(command)}
    values: dict[str, dict[str, Any]] = {group.name: {} for group in fields(Options)}
    for name, value in given.items():
        if name not in known:
            raise unknown_name("option", name, known)
        group, one, kind = known[name]
        values[group][name] = _read(name, value, kind, one.metadata["read"])
    return Options(**{one.name: one.type(**values[one.name]) for one in fields(Options)})  # type: ignore[operator]


def as_flags(group: Any, command: Command) -> list[str]:
    """What gives ``command`` those options of a group that are not at their defaults."""
    flags: list[str] = []
    for one in fields(group):
        value = getattr(group, one.name)
        if command in one.metadata["commands"] and value != one.default:
            flags += [f"--{one.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def plain_type(kind: Any) -> Any:
    """The type of a value that is given: ``int`` of ``int | None``, ``tuple`` of ``tuple[str, …]``."""
    kinds = [one for one in typing.get_args(kind) if one is not type(None)] if type(None) in typing.get_args(kind) else [kind]
    return typing.get_origin(kinds[0]) or kinds[0]


def _read(name: str, value: Any, kind: Any, read: Callable[[Any], Any] | None) -> Any:
    plain = plain_type(kind)
    if value is None and type(None) in typing.get_args(kind):
        return None
    try:
        if read is not None:
            return read(value)
        if plain is tuple:
            return (value,) if isinstance(value, str) else tuple(value)
        if plain is int and not isinstance(value, bool):
            return operator.index(value)
        if plain is Path or (plain is float and not isinstance(value, str | bool)):
            return plain(value)
    except (TypeError, ValueError) as error:
        raise _wrong_type(name, value, plain if read is None else read) from error
    if not isinstance(value, plain) or isinstance(value, bool) != (plain is bool):
        raise _wrong_type(name, value, plain)
    return value


def _wrong_type(name: str, value: Any, kind: Any) -> InputError:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path",
             tuple: "one name or several", read_counts: "a whole number, or several with commas",
             read_levels: "numbers with commas", read_sizes: "WIDTHxHEIGHT, or several with commas"}  # fmt: skip
    return InputError(f"{name.replace('_', '-')} is {value!r}; it must be {words.get(kind, 'names with their values')}")


def make_build_options(wish: BuildWish) -> BuildOptions:
    """What builders are asked for, but for the sizes.

    Raises:
        InputError: one is out of range, or contradicts another.
    """
    space = wish.workspace
    if space is not None and not 0 < space < math.inf:
        raise InputError(f"workspace is {space} GB; it must be above 0")
    return BuildOptions(
        strip=wish.strip_weights,
        refit=wish.refittable,
        compatibility=wish.hardware_compatibility,
        version_compatible=wish.version_compatible,
        level=wish.optimization_level,
        workspace=None if space is None else math.ceil(space * 1e9),
    )


def make_settings(spec: ModelSpec, wish: ModelSettings) -> Settings:
    """Settings of one size and one number of steps, with the model's defaults filled in.

    Raises:
        InputError: one is out of range, or several are given.
    """
    check_single(wish)
    return make_all_settings(spec, wish)[0]


def check_single(wish: ModelSettings) -> None:
    """Raise ``InputError`` if several sizes or numbers of steps are given."""
    if wish.size == "all":
        raise InputError("size is all, but only compile takes several: give one")
    for name, several in (
        ("steps", wish.steps),
        ("size", wish.size),
        ("text-tokens", wish.text_tokens),
        ("sigmas", wish.sigmas),
    ):
        if len(several or ()) > 1:
            raise InputError(f"{name} is {','.join(map(str, several or ()))}, but only compile takes several: give one")


def make_all_settings(spec: ModelSpec, wish: ModelSettings) -> tuple[Settings, ...]:
    """Settings of every size with every number of steps, the first of both first.

    Raises:
        InputError: one is out of range, given twice, or contradicts another.
    """
    if wish.size is not None and (wish.height, wish.width) != (None, None):
        raise InputError("--size contradicts --height and --width: give one")
    wished = _listed(spec) if wish.size == "all" else wish.size or ()
    for name, several in (("steps", wish.steps or ()), ("size", wished), ("text-tokens", wish.text_tokens or ())):
        if twice := sorted({str(one) for one in several if several.count(one) > 1}):
            raise InputError(f"{name} {', '.join(twice)} is given twice")
    given = {name: getattr(wish, name) for name in ("height", "width", "frames", "guidance")}
    usual = {name: getattr(spec, name) if value is None else value for name, value in given.items()}
    *shorter, longest = sorted(wish.text_tokens or (spec.text_tokens,))
    usual |= {"text_tokens": longest, "shorter_texts": tuple(shorter), "dtype": wish.dtype}
    usual |= {"cut": wish.cut, "true_cfg_scale": wish.true_cfg_scale}
    levels = _by_steps(wish.sigmas or ())
    counts = wish.steps or tuple(levels) or (spec.steps,)
    for own in levels.values():
        check_sigmas(own, len(own) if len(own) in counts else counts[0])
    sizes: list[dict[str, int]] = [vars(size) for size in wished]
    sizes = [size if size["frames"] > 1 else {**size, "frames": usual["frames"]} for size in sizes] or [{}]
    return tuple(
        Settings(**{**usual, **size, "steps": steps, "sigmas": levels.get(steps)}) for size in sizes for steps in counts
    )


def _by_steps(lists: tuple[tuple[float, ...], ...]) -> dict[int, tuple[float, ...]]:
    """Lists of noise levels by how many steps they are for: a bundle has one for each number of them."""
    found = {len(one): one for one in lists}
    if len(found) < len(lists):
        raise InputError(f"sigmas are {len(lists)} lists of {', '.join(str(len(one)) for one in lists)} noise levels, and a "
                         "bundle has one for each number of steps: compile another bundle for the other")  # fmt: skip
    return found


def _listed(spec: ModelSpec) -> tuple[PictureSize, ...]:
    if not spec.sizes:
        raise InputError(f"size is all, but {spec.name} has no list of sizes: give them, as --size 1024x1024,832x1216")
    return tuple(map(PictureSize.parse, spec.sizes))


def check_batch(batch: int | None) -> None:
    """Raise ``InputError`` unless requests can have so many samples; ``None`` is any number."""
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
