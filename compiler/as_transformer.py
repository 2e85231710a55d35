"""A bundle in the place of a pipeline's transformer: its engines and Programs answer the unmodified pipeline."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from cachec.compiler.accelerate import check_original
from cachec.compiler.drop_in.forms import Compiled, Form, Schedule
from cachec.compiler.drop_in.transformer import AcceleratedTransformer
from cachec.compiler.models import FAMILIES
from cachec.compiler.models.base import Family, LoadedModel, settings_of
from cachec.compiler.models.lora_files import as_option
from cachec.compiler.models.samples import difference, held_samples, lora_layers
from cachec.runtime.abi import COMPUTE
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.inspect import describe_loras
from cachec.runtime.session import LoadedBundle
from cachec.runtime.stepper import Stepper


def as_transformer(
    loaded: LoadedBundle, transformer: nn.Module, *, pipeline: Any = None, level: str | None = None
) -> AcceleratedTransformer:
    """What stands in the place of ``transformer``, which the bundle was compiled from, and plays a quality ``level``.

    ``pipeline``: the one that it is of; its scheduler is then compared with the bundle's, now and at every run.

    Raises:
        BundleError: the bundle does not say what its pipeline hands over.
        InputError: the transformer has other weights, another type or device, or an adapter; or the scheduler is another.
    """
    bundle, facts = loaded.bundle, loaded.manifest.facts.get("pipeline")
    if bundle is None or not facts:
        raise BundleError("the bundle does not say what its pipeline hands its transformer: compile it again")
    check_original(transformer)
    schedule = Schedule(facts["scheduler"], facts["config"], np.empty(0))
    graph = _graph_of(bundle, facts, transformer)
    _check_place(loaded, transformer)
    if graph != COMPUTE:
        return _first(loaded, pipeline).beside(transformer, graph)
    model = _model(facts, transformer, pipeline)
    if pipeline is not None:
        model.check_scheduler(pipeline.scheduler)
        if (change := schedule.other_settings(pipeline.scheduler)) is not None:
            raise InputError(
                f"{change}, as the bundle was compiled for: give the pipeline its scheduler again, or compile for it"
            )
    forms = [_form(loaded, bundle, schedule, one.size, one.steps, level) for one in bundle.manifest.variants]
    (here,) = loaded.manifest.variants
    own = next(form for form in forms if (form.settings.size, form.settings.steps) == (here.size, here.steps))
    for form in forms:
        form.program.check_both_branches()
    forms = [own, *(form for form in forms if form is not own)]
    return AcceleratedTransformer(transformer, pipeline, Compiled(forms, model.apart(), _device(loaded), loaded.origin))


def _form(loaded: LoadedBundle, bundle: Bundle, schedule: Schedule, size: str, steps: int, level: str | None) -> Form:
    there = bundle.at(size, steps)
    settings = replace(settings_of(there.manifest), shorter_texts=bundle.manifest.texts[:-1])
    handed, io = there.manifest.facts["handed"], loaded.io
    level = loaded.default_level if level is None else level
    signatures = {name: artifact.signature for name, artifact in there.target.engines.items()}
    specs = {spec.name: spec for signature in signatures.values() for spec in signature.inputs}
    tensors = load_file(bundle.path(handed["tensors"])) if "tensors" in handed else {}
    device = torch.device(_device(loaded))
    return Form(
        settings=settings,
        program=there.program(level),
        timesteps=np.array(handed["timesteps"], np.float32),
        constants={**handed["values"], **{name: tensor.to(device) for name, tensor in tensors.items()}},
        schedule=Schedule(schedule.kind, schedule.config, np.array(handed["levels"])),
        is_euler=handed["is_euler"],
        specs={io.latents: signatures[COMPUTE].input(io.latents), **{name: specs[name] for name in io.conditions}},
        open=partial(_open, loaded, level, size, steps),
    )


def _open(
    loaded: LoadedBundle, level: str, size: str, steps: int, *, batch: int, text: int, start: int, branch: str | None
) -> Stepper:
    return loaded.session(
        batch=batch, level=level, size=size, steps=steps, text=text, start=start, for_sampler=True, branch=branch
    )


def _model(facts: Mapping[str, Any], transformer: nn.Module, pipeline: Any) -> LoadedModel:
    """What knows how the pipeline's calls are read; without a pipeline, around the transformer alone."""
    kind: type[Family] = FAMILIES[facts["class"]]
    if pipeline is None:
        scheduler = getattr(diffusers, facts["scheduler"]).from_config(facts["config"])
        pipeline = SimpleNamespace(transformer=transformer, scheduler=scheduler, vae_scale_factor=facts["vae_scale_factor"])
    return kind.wrap(kind.make_spec(facts["class"], facts["class"]), pipeline, None)


def _graph_of(bundle: Bundle, facts: Mapping[str, Any], transformer: nn.Module) -> str:
    """The compute graph that was made of this transformer."""
    changes, held = {}, held_samples(transformer)
    for graph, name in facts["weights"].items():
        if (change := difference(load_file(bundle.path(name)), held)) is None:
            return str(graph)
        changes[graph] = change
    model = bundle.manifest.model
    raise InputError(
        f"the transformer is not the one that the bundle was compiled from, {model['source']}"
        f"{''.join(f' with {text}' for text in describe_loras(model.get('loras', ())))}: {changes[COMPUTE]}. "
        + _advice(model, has_lora=bool(lora_layers(transformer)))
        + "".join(f", or load the bundle with weights={name!r}" for name in bundle.manifest.weights)
    )


def _advice(model: Mapping[str, Any], *, has_lora: bool) -> str:
    """What to do about a transformer of other weights."""
    loras = model.get("loras", ())
    if len(loras) > 1 or any("part" in one for one in loras):
        return f"Load and fuse all of these at their scales ({', '.join(map(as_option, loras))}), or take a bundle without"
    if loras:
        return (f"Load the same with pipe.load_lora_weights('{loras[0]['name']}') and pipe.fuse_lora(lora_scale="
                f"{loras[0]['scale']:g}), or take a bundle without")  # fmt: skip
    if has_lora:
        return f"Take the LoRA off, or compile with it: cachec compile {model['source']} --lora FILE"
    return "Take the adapter off, or compile this one"


def _first(loaded: LoadedBundle, pipeline: Any) -> AcceleratedTransformer:
    """What stands in the place of the pipeline's first transformer."""
    for one in () if pipeline is None else vars(pipeline).values():
        if isinstance(one, AcceleratedTransformer) and one.plays(loaded.origin):
            return one
    raise InputError(
        "this is the second of the pipeline's transformers: put the same loaded bundle in the first one's place before, and "
        "pass pipeline=pipe"
    )


def _check_place(loaded: LoadedBundle, transformer: nn.Module) -> None:
    parameter = next(transformer.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    if dtype != loaded.target.precision:
        raise InputError(
            f"the transformer is {dtype}, the bundle {loaded.target.precision}: load the pipeline with torch_dtype="
            f"torch.{loaded.target.precision}, or compile with --dtype {dtype}"
        )
    if parameter.device != torch.device(_device(loaded)):
        raise InputError(
            f"the transformer is on {parameter.device}, the bundle's engines on {_device(loaded)}: move the pipeline with "
            f"pipe.to, or load the bundle with device={str(parameter.device)!r}"
        )


def _device(loaded: LoadedBundle) -> str:
    name: str = next(iter(loaded.engines.values())).device.name
    return name
