"""What a bundle says of the pipeline that it was compiled from, so that it can stand in one's transformer's place.

``T`` steps.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from cachec.compiler.drop_in.forms import Schedule, is_empty
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.samples import sample_weights
from cachec.runtime.abi import COMPUTE, EXPERT
from cachec.runtime.errors import InputError
from cachec.runtime.own_levels import FACT, SAME, Levels
from cachec.runtime.write import Collector

PROBE = (1.0, 0.72, 0.43, 0.17)  # noise levels to look what a pipeline makes of them
FOLDER = "drop_in"
SECOND = "transformer_2"  # what pipelines of diffusers call a second transformer


def pipeline_facts(model: LoadedModel, settings: Settings, writer: Collector) -> dict[str, Any]:
    """Its class and scheduler, and by compute graph a file of some values of every weight.

    Nothing of a family that tells no scheduler.
    """
    scheduler = model.scheduled(settings)
    if scheduler is None:
        return {}
    schedule = Schedule.of(scheduler)
    return {
        "class": type(model.pipeline).__name__,
        "scheduler": schedule.kind,
        "config": json.loads(json.dumps(schedule.config, default=str)),
        "vae_scale_factor": getattr(model.pipeline, "vae_scale_factor", None),
        "weights": samples_of(model, writer, "weights"),
    }


def samples_of(model: LoadedModel, writer: Collector, name: str) -> dict[str, str]:
    """By compute graph a file of some values of every weight, called ``name``."""
    models = {COMPUTE: model, **({} if model.expert is None else {EXPERT: model.expert[0]})}
    return {graph: writer.add_bytes(f"{FOLDER}/{name}.safetensors", save(sample_weights(one))) for graph, one in models.items()}


def handed_facts(model: LoadedModel, settings: Settings, writer: Collector) -> dict[str, Any]:
    """What the pipeline hands over at these settings, besides latents and conditions.

    ``timesteps`` [T] are what its sampler tells, ``levels`` those of its scheduler. ``own_sigmas``: what
    it makes of others, where that is known. Constants of the graphs are ``values``, or ``tensors`` in a file.
    """
    scheduler = model.scheduled(settings)
    if scheduler is None:
        return {}
    constants, sampling = handed_constants(model, settings), model.sampling(settings)
    tensors = {name: value.cpu().contiguous() for name, value in constants.items() if isinstance(value, torch.Tensor)}
    return {
        "timesteps": [float(time) for time in sampling.timesteps],
        "levels": Schedule.of(scheduler).levels.tolist(),
        "is_euler": sampling.euler is not None,
        "values": {name: value for name, value in constants.items() if name not in tensors},
        **({} if (made := levels_of(model, settings)) is None else {FACT: made.to_json()}),
        **({"tensors": writer.add_bytes(f"{FOLDER}/constants.safetensors", save(tensors))} if tensors else {}),
    }


def levels_of(model: LoadedModel, settings: Settings) -> Levels | None:
    """What the pipeline makes of noise levels of the user's own at these sizes: read off two runs with such levels.

    ``None`` where its call takes none, where its sampler is none of flows, or where they do not come out as :class:`Levels` has
    them (Karras noise levels and the like): such are for ``--sigmas`` at compile time.
    """
    many = settings.steps if settings.steps > 2 and settings.steps != len(PROBE) else len(PROBE) + 1
    try:
        few, same = (_probed(model, replace(settings, steps=len(one), sigmas=one)) for one in (PROBE, spread_levels(many)))
    except InputError:  # its call takes none
        return None
    if few is None or same is None:
        return None
    is_one = math.isclose(few.factor, same.factor, rel_tol=SAME) and few.terminal == same.terminal
    return few if is_one else replace(same, steps=many) if many == settings.steps else None


def spread_levels(steps: int) -> tuple[float, ...]:
    """Noise levels [T] that no sampler has by itself."""
    return tuple(float(one) for one in np.linspace(1, 0.15, steps) ** 1.3)


def _probed(model: LoadedModel, settings: Settings) -> Levels | None:
    """What these very levels lead to, as a rule that gives them; ``None``: there is none."""
    sampling, given = model.sampling(settings), np.array(settings.sigmas, np.float64)
    if sampling.euler is None or sampling.graphs is not None or sampling.targets is not None:
        return None
    if not np.allclose(sampling.euler[0], 1, atol=SAME):  # no flow
        return None
    levels, told = sampling.sigmas[:-1].astype(np.float64), sampling.timesteps.astype(np.float64)
    ratio = (1 - levels[1]) / (1 - levels[-1]) * (1 - given[-1]) / (1 - given[1])  # which no stretching changes
    factor = 1 + (1 - ratio) / (ratio * given[1] - given[-1])
    slope = (told[0] - told[-1]) / (levels[0] - levels[-1])
    rule = Levels(float(factor), None, float(slope), float(told[0] - slope * levels[0]), None)
    for one in (rule, replace(rule, terminal=float(levels[-1]))):
        made, times = one.of(given)
        if np.allclose(made, sampling.sigmas, rtol=0, atol=SAME) and np.allclose(times, told, rtol=0, atol=SAME * abs(slope)):
            return one
    return None


def handed_constants(model: LoadedModel, settings: Settings) -> Mapping[str, Any]:
    """The graphs' constants that a call hands over."""
    constants = model.constants(settings).items()
    return {name: value for name, value in constants if name != "return_dict" and not is_empty(value)}
