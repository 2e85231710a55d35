"""From what a user says to a checked request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import Method
from cachec.compiler.models.base import ModelSpec, Settings
from cachec.compiler.schedule import Schedule, parse_schedule, uniform_schedule
from cachec.engines import BACKENDS
from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.noise import check_seed


@dataclass(frozen=True)
class Request:
    """What to compile. ``interval`` is recorded if the schedule came from one; ``fold`` is ``--fold static``.

    ``retrain``: prompts were given, so a predictor that ships is not used.
    """

    method: Method
    schedule: Schedule
    settings: Settings
    backend: str = "ort"
    interval: int | None = None
    predictor: Path | None = None
    prompts: Sequence[str] = ()
    retrain: bool = False
    seed: int = 0
    batch: int | None = None
    fold: bool = True
    verify_passes: bool = False
    dump_graphs: Path | None = None


def make_request(
    spec: ModelSpec,
    *,
    method: str = "lesa",
    options: Mapping[str, str] | None = None,
    steps: int = 50,
    interval: int | None = None,
    budget: int | None = None,
    schedule: str | None = None,
    backend: str = "ort",
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
    verify_passes: bool = False,
    dump_graphs: str | Path | None = None,
) -> Request:
    """Check all options against each other and fill in the model's defaults.

    At most one of ``interval`` (the method's published rule), ``budget`` (number of computed steps, evenly spread) and
    ``schedule`` (``0,1,2,9``) may be given; the default is the method's own interval. ``prompts`` is a file of training
    prompts. ``fold`` is ``static`` or ``none``.

    Raises:
        InputError: an option is unknown, out of range, or contradicts another.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if fold not in ("static", "none"):
        raise InputError(f"fold is {fold!r}; use static or none")
    check_seed(seed)
    if batch is not None and batch < 1:
        raise InputError(f"batch is {batch}; it must be at least 1")
    chosen = get_method(method).with_options(options or {})
    settings = Settings(
        height=spec.height if height is None else height,
        width=spec.width if width is None else width,
        text_tokens=spec.text_tokens if text_tokens is None else text_tokens,
        guidance=spec.guidance if guidance is None else guidance,
        steps=steps,
        dtype=dtype,
    )
    if predictor is not None and prompts is not None:
        raise InputError("--predictor and --prompts contradict each other: a given predictor is not trained")
    if predictor is not None and not chosen.needs_training:
        raise InputError(f"method {method!r} has no trained predictor, so --predictor {predictor} cannot be used")
    plan, interval = _choose_schedule(chosen, steps, interval, budget, schedule)
    return Request(
        method=chosen,
        schedule=plan,
        settings=settings,
        backend=backend,
        interval=interval,
        predictor=Path(predictor) if predictor else None,
        prompts=read_prompts(Path(prompts)) if prompts else default_prompts(spec.prompts, "train"),
        retrain=prompts is not None,
        seed=seed,
        batch=batch,
        fold=fold == "static",
        verify_passes=verify_passes,
        dump_graphs=Path(dump_graphs) if dump_graphs else None,
    )


def _choose_schedule(
    method: Method, steps: int, interval: int | None, budget: int | None, schedule: str | None
) -> tuple[Schedule, int | None]:
    given = [name for name, value in (("interval", interval), ("budget", budget), ("schedule", schedule)) if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join('--' + name for name in given)} contradict each other: give one")
    if schedule is not None:
        return parse_schedule(schedule, steps), None
    if budget is not None:
        return uniform_schedule(steps, budget), None
    interval = method.default_interval if interval is None else interval
    return method.interval(steps, interval), interval
