"""``cachec.accelerate``: a pipeline in memory, compiled in place, without files.

The pipeline keeps its own loop and its own sampler; its transformer is replaced by one that computes some steps and hands out
forecasts at the others.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from cachec.compiler.drop_in.forms import Compiled, Form, Schedule
from cachec.compiler.drop_in.transformer import AcceleratedTransformer
from cachec.compiler.frontend import (
    check,
    find_calibrations,
    find_parameters,
    make_graphs,
    make_plans,
    make_programs,
)
from cachec.compiler.handed import SECOND, handed_constants
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.models.samples import lora_layers
from cachec.compiler.request import Request
from cachec.compiler.stand_in import BACK
from cachec.engines.eager import EagerEngine
from cachec.engines.inductor import InductorEngine
from cachec.engines.torch_device import TorchDevice, neutral_modes
from cachec.runtime.abi import COMPUTE, EXPERT
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.files import temporary_folder
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.starting import starting_at
from cachec.runtime.stepper import Stepper


def accelerate_pipeline(model: LoadedModel, request: Request, *, compiled: bool = True) -> Any:
    """Replace the transformer of ``model``'s pipeline; returns the pipeline.

    Engines and buffers are where the transformer is, and in its precision (norms and the like in float32, its weights shared).

    ``compiled``: run the graphs under ``torch.compile``, else op by op.

    Raises:
        CachecError: of the kind that fits; the pipeline is then as it was.
    """
    for one in (model, *(() if model.expert is None else (model.expert[0],))):
        check_original(one.transformer)
        if lora_layers(one.transformer):
            raise InputError("the transformer has a LoRA beside its weights: fuse it with pipe.fuse_lora(), then call "
                             "pipe.unload_lora_weights()")  # fmt: skip
    forms = []
    with neutral_modes(str(model.device)):
        for one in request.variants:
            fitted = _fit_request(model, one)
            by_text, programs = compile_in_memory(model, fitted, InductorEngine if compiled else EagerEngine)
            program = next(program for level, program in programs.items() if level != UNCACHED)
            forms.append(make_form(model, fitted.settings, by_text, program))
        result = Compiled(forms, model.apart(), str(model.device))
        first = AcceleratedTransformer(model.transformer, model.pipeline, result)
        second = None if model.expert is None else first.beside(model.expert[0].transformer, EXPERT)
        model.pipeline.transformer = first
        if second is not None:
            setattr(model.pipeline, SECOND, second)
    return model.pipeline


def make_form(model: LoadedModel, settings: Settings, by_text: Mapping[int, Mapping[str, Engine]], program: Program) -> Form:
    """What the pipeline of ``model`` hands over at these settings, and what answers it: engines by length of texts."""
    engines = by_text[settings.text_tokens]
    scheduler, signature, io = model.scheduled(settings), engines[COMPUTE].signature, model.io
    sampling = model.sampling(settings)
    specs = {spec.name: spec for engine in engines.values() for spec in engine.signature.inputs}
    return Form(
        settings=settings,
        program=program,
        timesteps=sampling.timesteps,
        constants=handed_constants(model, settings),
        schedule=None if scheduler is None else Schedule.of(scheduler),
        is_euler=sampling.euler is not None,
        specs={io.latents: signature.input(io.latents), **{name: specs[name] for name in io.conditions}},
        open=partial(_open, by_text, program, io),
    )


def _open(
    by_text: Mapping[int, Mapping[str, Engine]], program: Program, io: ModelIO, *, batch: int, text: int, start: int,
    branch: str | None,
) -> Stepper:  # fmt: skip
    return Stepper(by_text[text], starting_at(program, start).of_branch(branch), io, batch=batch)


def check_original(transformer: nn.Module) -> None:
    """Raise ``InputError`` for what would be baked in without its meaning, or would move weights away from the engines."""
    if isinstance(transformer, AcceleratedTransformer):
        raise InputError(f"this pipeline is accelerated already: {BACK} first")
    if getattr(transformer, "is_cache_enabled", False):
        raise InputError("the transformer has a cache of diffusers: call pipe.transformer.disable_cache() first")
    if any(hasattr(module, "_hf_hook") for module in transformer.modules()):
        raise InputError("the transformer's weights are moved by offload hooks: call pipe.remove_all_hooks() first, and "
                         "pipe.to(…) the device that it shall run on")  # fmt: skip


def compile_in_memory(
    model: LoadedModel, request: Request, kind: type[EagerEngine | InductorEngine]
) -> tuple[dict[int, dict[str, Engine]], Mapping[str, Program]]:
    """By length of texts engines by name, and Programs by level, of a request as :func:`accelerate_pipeline` fits them."""
    checked = check(model, request)
    with temporary_folder() as work:
        parameters = find_parameters(model, request, checked, work / "training")
        device, by_row = TorchDevice(DeviceName.parse(str(model.device))), request.method.weighs_rows(parameters)

        def engines(settings: Settings) -> dict[str, Engine]:
            # merged linear layers would be copies: the transformer's weights are shared
            graphs = make_graphs(model, replace(request, settings=settings), parameters, by_row=by_row, merge=False)
            plans = make_plans(model, settings, graphs)
            return {plan.name: kind(graphs.engine.modules[plan.name], plan.signature, device) for plan in plans}

        by_text = {one.text_tokens: engines(one) for one in request.settings.by_text}
        calibrations = find_calibrations(model, request, checked, work / "calibration", parameters)
        longest = by_text[request.settings.text_tokens]
        return by_text, make_programs(model, request, longest, calibrations, parameters).by_level


def _fit_request(model: LoadedModel, request: Request) -> Request:
    """The request in the transformer's own precision.

    Raises:
        InputError: passes are to be verified, which is done on the CPU, and the model is elsewhere.
    """
    device = DeviceName.parse(str(model.device))
    if device.kind != CPU and request.wish.graph.verify_passes:
        raise InputError(f"the pipeline is on {device}, but passes are verified on the CPU: move it there, or leave that out")
    dtype = str(next(model.transformer.parameters()).dtype).removeprefix("torch.")
    wish = replace(request.wish, graph=replace(request.wish.graph, velocities=True))  # which the drop-in hands out
    return replace(request, wish=wish, device=device, settings=replace(request.settings, dtype=dtype))
