"""LESA beside training-free caches, as its paper has it, and caches as diffusers has them: a part of ``bench.quality``.

LESA, TaylorSeer and FORA compute the steps of their own rule at intervals 7 and 10. The caches of diffusers decide for every
request which steps they compute: their thresholds are found on training captions, so that as many are computed as LESA does.
They run in the unmodified pipeline, one caption at a time.

SeaCache accumulates the relative L1 change of the (filtered) input against a threshold, as TeaCache does, which diffusers has
not; residuals are repeated (order 0), as often in turn as its rule says.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, SeaCacheConfig
from torch import nn

from bench.quality_methods import make_method, measure_on, plan, trained
from bench.quality_setting import AbsentError, Rows, Setting, lent
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.calibration.runs import training_seeds
from cachec.compiler.methods import get_method
from cachec.compiler.methods.parameters import Parameters, check_fit, load_predictor
from cachec.compiler.methods.training import find_shipped, training_facts
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.planning.goals import Goal
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
from cachec.runtime.specs import Array

CACHES = "caches"  # the part that these rows are
INTERVALS = (7, 10)
# of LESA where guidance is true: one predictor for both branches, one for each, and with the bound of the code for Qwen-Image
FORMS: Mapping[str, Mapping[str, Any]] = {
    "": {"branches": "shared"},
    ", apart": {"branches": "apart"},
    ", apart, 0.4": {"branches": "apart", "second_bound": 0.4},
}
TRIED, HALVINGS = 3, 6  # captions that thresholds are found on, and how often the range is halved
LARGEST = 2.0  # threshold

log = logging.getLogger(__name__)


def bench_caches(rows: Rows, setting: Setting) -> None:
    """All rows."""
    budgets = [len(get_method("lesa").with_options({}).interval(setting.num_steps, interval).compute) for interval in INTERVALS]
    for interval, budget in zip(INTERVALS, budgets, strict=True):
        for name in ("taylor:1", "taylor:2", "reuse"):
            schedule = make_method(setting, name).interval(setting.num_steps, interval)
            rows.measure(
                CACHES,
                budget,
                name,
                f"N = {interval}",
                lambda n=name, s=schedule: measure_on(setting, make_method(setting, n), s, n),
            )
        for name, make in CONFIGS.items():
            rows.measure(CACHES, budget, name, "threshold", lambda m=make, k=budget: measure_cache(setting, m, k))
    forms = FORMS if setting.guided else {"": {}}
    for interval, budget in zip(INTERVALS, budgets, strict=True):
        for form, options in forms.items():
            label = f"N = {interval}{form}"
            rows.measure(CACHES, budget, "lesa", label, lambda n=interval, o=options: measure_lesa(setting, n, o))


def measure_lesa(setting: Setting, interval: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """LESA's row, with the predictor in ``WORK/MODEL/predictors`` that is named for its options, or one that ships.

    Raises:
        AbsentError: there is none; it is not trained here, which takes about ten minutes, but for a brief look.
    """
    method = replace(make_method(setting, "lesa"), **options)
    schedule = method.interval(setting.num_steps, interval)
    file = setting.work / "predictors" / f"{'-'.join(['lesa', *map(str, options.values()), str(interval)])}.safetensors"
    if setting.extent.brief:
        parameters: Parameters | None = trained(setting, method, schedule, "lesa", interval=interval)
    elif file.exists():
        parameters = load_predictor(file)
        check_fit(parameters, training_facts(setting.model, method, schedule, setting.settings))
    else:
        parameters = find_shipped(setting.model, method, schedule, setting.settings)
    if parameters is None:
        asked = "".join(f" --set {name}={value}" for name, value in options.items())
        raise AbsentError(
            f"not trained yet: `cachec train {setting.name} --method lesa --interval {interval}{asked} -o {file}`"
        )
    return setting.measure(plan(setting, method, Goal(schedule=schedule), parameters))


def _tokens(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> list[torch.Tensor]:
    """Latents of each sample as SeaCache looks at them [C, frames, height, width]; packed ones are of a square picture."""
    latents = given["hidden_states"] if "hidden_states" in given else args[0]
    if latents.ndim == 5:
        return list(latents)
    side = round(latents.shape[1] ** 0.5)
    return [sample.T.reshape(sample.shape[1], 1, side, side) for sample in latents]


CONFIGS: Mapping[str, Callable[[float], Any]] = {
    "FirstBlockCache": lambda threshold: FirstBlockCacheConfig(threshold=threshold),
    "SeaCache": lambda threshold: SeaCacheConfig(
        threshold=threshold, residual_order=0, max_consecutive_cached=0, raw_vision_callback=_tokens
    ),
}


@dataclass
class _Executed:
    """How many blocks were executed in a request; the calls of the whole model, and of these those with every block."""

    blocks: int = 0
    since: int = 0
    calls: int = 0
    whole: int = 0


@contextmanager
def counting(model: LoadedModel) -> Iterator[tuple[_Executed, int]]:
    """Counts blocks that are executed: in a skipped one the first linear of its attention is not. And how many there are."""
    counted, lists = _Executed(), ("transformer_blocks.", "single_transformer_blocks.")
    found = [module for name, module in model.transformer.named_modules()
             if name.startswith(lists) and name.endswith("attn.to_q")]  # fmt: skip
    if not found:
        raise InputError(f"no blocks with an attention of their own are known in {model.spec.name}")

    def executed(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counted.blocks += 1
        counted.since += 1

    def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counted.calls += 1
        counted.whole += counted.since == len(found)
        counted.since = 0

    hooks = [module.register_forward_hook(executed) for module in found]
    hooks.append(model.transformer.register_forward_hook(called))
    try:
        yield counted, len(found)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def telling_steps(transformer: Any, sigmas: Array) -> Iterator[Counter[str]]:
    """SeaCache wants to know which step it is, at which noise level [T + 1]; these pipelines do not say it, so it is counted.

    The counter of calls, by branch of guidance, is to be cleared before each request.
    """
    plain, calls, num_steps = transformer.cache_context, Counter[str](), len(sigmas) - 1

    def told(name: str) -> Any:
        step = calls[name]
        calls[name] += 1
        return plain(name, step_index=step, sigma=float(sigmas[step]), num_inference_steps=num_steps)

    transformer.cache_context = told
    try:
        yield calls
    finally:
        del transformer.cache_context


def measure_cache(setting: Setting, make: Callable[[float], Any], budget: int) -> dict[str, Any]:
    """The row of a cache of diffusers whose threshold makes it compute ``budget`` steps, or fewer, of training captions."""
    captions = default_prompts(setting.model.spec.prompts, "train")[:TRIED]
    shape = setting.noise.shape[1:]
    noise = np.stack([make_noise(seed, shape) for seed in training_seeds(0, TRIED)])
    conditions = setting.model.encode(captions, setting.settings, setting.model.conditions(setting.settings))
    low, high = 0.0, LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        _, computed, _ = run_cached(setting, make(middle), noise, conditions)
        low, high = (low, middle) if np.mean(computed) <= budget else (middle, high)
    latents, computed, work = run_cached(setting, make(high), setting.noise, setting.conditions)
    counts = {"computed": round(float(np.mean(computed)), 2), "work": round(float(np.mean(work)), 2)}
    return {**counts, "computed_range": [int(min(computed)), int(max(computed))], "threshold": high, **setting.compare(latents)}


def run_cached(
    setting: Setting, config: Any, noise: Array, conditions: Mapping[str, Array]
) -> tuple[Array, list[float], list[float]]:
    """Latents [P, …], and for each caption the steps with every block, and executed blocks in runs of the model."""
    model, latents, computed, work = setting.model, [], [], []
    transformer: Any = model.transformer
    transformer.enable_cache(config)
    try:
        with (
            lent(model.pipeline, setting.device),
            counting(model) as (counted, num_blocks),
            telling_steps(transformer, setting.calibration.sampling.sigmas) as steps,
        ):
            for at in range(len(noise)):
                one = {name: value[at : at + 1] for name, value in conditions.items()}
                counted.blocks = counted.since = counted.calls = counted.whole = 0
                steps.clear()
                latents.append(model.generate(one, noise[at : at + 1], setting.settings))
                branches = counted.calls / setting.num_steps
                computed.append(counted.whole / branches)
                work.append(counted.blocks / num_blocks / branches)
    finally:
        transformer.disable_cache()
    return np.concatenate(latents), computed, work
