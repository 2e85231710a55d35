"""``cachec plan``: what a model will take, from its configuration alone."""

import logging
from typing import TYPE_CHECKING, Any

from cachec.runtime.errors import InputError, need
from cachec.runtime.sizes import USUAL_STRIDE

if TYPE_CHECKING:
    from cachec.compiler.planning.estimate import Estimate
    from cachec.compiler.planning.gpus import GpuFigures


log = logging.getLogger(__name__)


def plan_model(source: str, *, gpu: str | None = None, **options: Any) -> "tuple[Estimate, tuple[GpuFigures, ...]]":
    """What the model ``source`` takes, and the GPUs to say it for: one, or all that are known.

    ``options`` are those that ``cachec.compiler.options`` declares for it. No weights are read, and no network is asked.

    Raises:
        InputError: no such model or GPU, with those that there are; or an option is out of range.
        ModelUnavailableError: a configuration is missing or damaged.
    """
    need("torch", "diffusers", "transformers", "accelerate", extra="compile", purpose="planning")
    from cachec.compiler.graphs.prepare import engine, linear, prepare, with_blocks
    from cachec.compiler.methods import get_method
    from cachec.compiler.methods.base import BlockMethod
    from cachec.compiler.models import outline_model
    from cachec.compiler.options import check_batch, make_settings, read_options
    from cachec.compiler.planning.estimate import estimate
    from cachec.compiler.planning.goals import KINDS
    from cachec.compiler.planning.gpus import get_gpus
    from cachec.compiler.tables.schedule import parse_schedule, uniform_schedule

    wish, gpus = read_options(options, "plan"), get_gpus(gpu)
    budget, given, batch = wish.schedule.budget, wish.schedule.schedule, wish.model.batch
    check_batch(batch)
    if given in KINDS[1:]:
        raise InputError(f"schedule is {given}, for which a method is needed: give --budget, or the steps to compute")
    given = None if given == KINDS[0] else given
    if budget is not None and given is not None:
        raise InputError("--budget and --schedule contradict each other: give one")
    method = get_method(wish.schedule.method).with_options(wish.schedule.options or {})
    model = outline_model(source)
    settings = make_settings(model.spec, wish.model)
    if isinstance(method, BlockMethod):
        method.check(model, settings)
    usual = max(1, settings.steps // USUAL_STRIDE)
    schedule = uniform_schedule(settings.steps, usual if budget is None else budget)
    if given is not None:
        schedule = parse_schedule(given, settings.steps)
        schedule.check_conditional("output", guided=model.is_guided(settings))
    log.warning("capturing %s without its weights, which takes up to a minute or two for a large one", model.spec.name)
    if isinstance(method, BlockMethod):
        plain = with_blocks(model, settings, method.outlined(model))
    else:
        plain = linear(prepare(model, settings))
    built = engine(plain, model.io)
    branches = 2 if model.is_guided(settings) else 1
    found = estimate(
        plain,
        built,
        model.spec,
        settings,
        budget=len(schedule.compute),
        batch=batch or 1,
        branches=branches,
        work=schedule.work,
        others=model.part_counts(),
    )
    return found, gpus
