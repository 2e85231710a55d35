"""What a bundle says of the pipeline that it was compiled from, so that it can stand in one's transformer's place.

``T`` steps.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

from cachec.compiler.drop_in.forms import Schedule, is_empty
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.samples import sample_weights
from cachec.runtime.abi import COMPUTE, EXPERT
from cachec.runtime.write import Collector

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

    ``timesteps`` [T] are what its sampler tells, ``levels`` those of its scheduler. Constants of the graphs are ``values``, or
    ``tensors`` in a file.
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
        **({"tensors": writer.add_bytes(f"{FOLDER}/constants.safetensors", save(tensors))} if tensors else {}),
    }


def handed_constants(model: LoadedModel, settings: Settings) -> Mapping[str, Any]:
    """The graphs' constants that a call hands over."""
    constants = model.constants(settings).items()
    return {name: value for name, value in constants if name != "return_dict" and not is_empty(value)}
