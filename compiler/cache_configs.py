"""Caches as other libraries configure them, as a method and a schedule of ours.

cache-dit's YAML (a steps mask, and a calibrator that forecasts what is cached) and diffusers' ``TaylorSeerCacheConfig`` say
beforehand which steps are computed. What looks at thresholds while the model runs says nothing that could be compiled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, in_one_line, need, shortened
from cachec.runtime.files import read_text_file

MASK, POLICY = "steps_computation_mask", "steps_computation_policy"
FORECASTS = {"enable_taylorseer": "taylor", "enable_foca": "foca"}  # calibrators of cache-dit, and ours
RUNTIME = "decides while the model runs, by a threshold, which steps it computes: that cannot be compiled"
NEAREST = "count the steps that it computes on your prompts (cache_dit.summary prints them), and give as many as --budget"


def schedule_options(config: Any, steps: int) -> dict[str, Any]:
    """``method``, ``options`` and ``schedule`` of a run of ``steps`` steps, as ``cachec compile`` takes them.

    ``config``: a YAML file of cache-dit, with ``cache_config`` at its top or flat; the same as a mapping; or one of diffusers'
    cache configurations.

    Raises:
        InputError: it decides at run time, is of another number of steps, or is none of these.
    """
    if isinstance(config, str | Path):
        config = _read_yaml(Path(config))
    if isinstance(config, Mapping):
        return _from_cache_dit(config.get("cache_config", config), steps)
    kind = type(config).__name__
    if kind == "TaylorSeerCacheConfig":
        return _from_taylorseer(config, steps)
    if hasattr(config, "threshold"):
        raise InputError(f"{kind} with threshold {config.threshold} {RUNTIME}; {NEAREST}")
    raise InputError(f"a {kind} is no cache that cachec knows: give a cache-dit YAML, or diffusers' TaylorSeerCacheConfig")


def _read_yaml(path: Path) -> Any:
    need("yaml", extra="compile", purpose="reading cache configurations")
    import yaml

    try:
        found = yaml.safe_load(read_text_file(path, "cache configuration"))
    except yaml.YAMLError as error:
        raise InputError(f"cache configuration {path} is no YAML: {in_one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"cache configuration {path} is {shortened(found)}; it must be keys with values, as cache_config:")
    return found


def _from_cache_dit(given: Any, steps: int) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"cache_config is {shortened(given)}; it must be keys with values")
    kind, mask = given.get("cache_type", "DBCache"), given.get(MASK)
    if kind != "DBCache":
        raise InputError(f"cache_type {shortened(kind)} leaves out blocks by what it sees while the model runs; take DBCache")
    if mask is None:
        raise InputError(f"a DBCache without {MASK} {RUNTIME}; {NEAREST}, or give it a mask")
    if given.get(POLICY, "dynamic") != "static":
        raise InputError(f"{POLICY} {shortened(given.get(POLICY, 'dynamic'))} {RUNTIME} of those that the mask lets it skip: "
                         f"set {POLICY}: static, which skips them all")  # fmt: skip
    computed = [_is_computed(one) for one in (mask.strip() if isinstance(mask, str) else mask)]
    if len(computed) != steps:
        raise InputError(f"{MASK} is of {len(computed)} steps, and {steps} are asked for: give --steps {len(computed)}")
    schedule = Schedule(steps, tuple(step for step, one in enumerate(computed) if one))
    chosen = [name for key, name in FORECASTS.items() if given.get(key)]
    if given.get("enable_dmd") or len(chosen) > 1:
        raise InputError("cache_config has a calibrator that cachec does not know, or several: taylorseer or foca, or none")
    if chosen == ["taylor"]:
        return _options("taylor", schedule, order=given.get("taylorseer_order", 1))
    return _options(chosen[0] if chosen else "reuse", schedule)


def _is_computed(one: Any) -> bool:
    if str(one) not in ("0", "1"):
        raise InputError(f"{MASK} holds {shortened(one)}; it has 1 for steps that are computed and 0 for those that are not")
    return str(one) == "1"


def _from_taylorseer(config: Any, steps: int) -> dict[str, Any]:
    """Diffusers' rule; it forecasts what every attention gives, where we forecast what the last block gives."""
    first, last = config.disable_cache_before_step, config.disable_cache_after_step
    computed = tuple(
        step
        for step in range(steps)
        if step < first or (step - first - 1) % config.cache_interval == 0 or (last is not None and step >= last)
    )
    return _options("taylor", Schedule(steps, computed), order=config.max_order)


def _options(method: str, schedule: Schedule, **options: Any) -> dict[str, Any]:
    texts = {name: str(value) for name, value in options.items()}
    return {"method": method, "options": texts, "schedule": ",".join(map(str, schedule.compute))}
