"""``cachec.accelerate``: a pipeline in memory, compiled in place, without files.

The pipeline keeps its own loop and its own sampler; its transformer is replaced by one that computes some steps and hands out
forecasts at the others.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from cachec.compiler.frontend import (
    check,
    find_calibrations,
    find_parameters,
    make_graphs,
    make_plans,
    make_programs,
)
from cachec.compiler.models.base import LoadedModel
from cachec.compiler.request import Request
from cachec.engines.eager import EagerEngine
from cachec.engines.inductor import InductorEngine
from cachec.engines.torch_device import TorchDevice
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.files import temporary_folder
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.stepper import Stepper


def accelerate_pipeline(model: LoadedModel, request: Request, *, compiled: bool = True) -> Any:
    """Replace the transformer of ``model``'s pipeline; returns the pipeline.

    Engines and buffers are where the transformer is, and in its precision (norms and the like in float32, its weights shared).

    ``compiled``: run the graphs under ``torch.compile``, else op by op.

    Raises:
        CachecError: of the kind that fits; the pipeline is then as it was.
    """
    if isinstance(model.transformer, AcceleratedTransformer):
        raise InputError("this pipeline is accelerated already: set pipe.transformer = pipe.transformer.original first")
    request = _fit_request(model, request)
    kind: type[EagerEngine | InductorEngine] = InductorEngine if compiled else EagerEngine
    engines, programs = compile_in_memory(model, request, kind)
    program = next(program for level, program in programs.items() if level != UNCACHED)
    pipeline = model.pipeline
    pipeline.transformer = AcceleratedTransformer(model.transformer, pipeline.scheduler, engines, program, model.io)
    return pipeline


def compile_in_memory(
    model: LoadedModel, request: Request, kind: type[EagerEngine | InductorEngine]
) -> tuple[dict[str, Engine], Mapping[str, Program]]:
    """Engines by name, and Programs by level, of a request that :func:`accelerate_pipeline` fitted to the pipeline."""
    checked = check(model, request)
    with temporary_folder() as work:
        parameters = find_parameters(model, request, checked, work / "training")
        graphs = make_graphs(model, request, parameters)
        device = TorchDevice(DeviceName.parse(str(model.device)))
        engines: dict[str, Engine] = {
            plan.name: kind(graphs.engine.modules[plan.name], plan.signature, device)
            for plan in make_plans(model, request, graphs)
        }
        calibrations = find_calibrations(model, request, checked, work / "calibration")
        return engines, make_programs(model, request, graphs, engines, calibrations, parameters).by_level


def _fit_request(model: LoadedModel, request: Request) -> Request:
    """The request in the transformer's own precision.

    Raises:
        InputError: the method is fitted to runs of the model, which are made on the CPU, and the model is elsewhere.
    """
    name = model.device.type
    if name != CPU and (request.needs_calibration or request.method.needs_training or request.verify_passes):
        raise InputError(
            f"the pipeline is on {name}, but {request.method.name} with this schedule needs runs of the model, or checks, that "
            "are made on the CPU: name a method and a schedule that need none (taylor or adams with a budget)"
        )
    dtype = str(next(model.transformer.parameters()).dtype).removeprefix("torch.")
    return replace(request, settings=replace(request.settings, dtype=dtype), velocities=True)


class AcceleratedTransformer(nn.Module):
    """Stands where the transformer was. Whatever it does not do itself, it asks of the ``original``."""

    def __init__(
        self, original: nn.Module, scheduler: Any, engines: Mapping[str, Engine], program: Program, io: ModelIO
    ) -> None:
        super().__init__()
        self.original = original
        self.program = program
        self._scheduler, self._engines, self._io = scheduler, engines, io
        self._sessions: dict[int, Stepper] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    @contextmanager
    def cache_context(self, name: str) -> Any:
        """Diffusers' own caches ask for one; there is nothing to keep apart here: each batch size has its session."""
        yield

    @torch.no_grad()
    def forward(self, *, return_dict: bool = True, **inputs: Any) -> Any:
        """The velocity at the scheduler's current step, from the transformer's usual keywords.

        Raises:
            InputError: the run is not the one that was compiled: other steps, sizes or inputs.
        """
        step = self._scheduler.step_index or 0
        known = {name: inputs[name].float() for name in (self._io.latents, *self._io.conditions)}
        device = self._engines["compute"].device
        if strange := [name for name, value in known.items() if not device.owns(value)]:
            raise InputError(
                f"{', '.join(strange)} are not on {device.name}, where this pipeline was accelerated: move it back, or set "
                "pipe.transformer = pipe.transformer.original and accelerate it again"
            )
        self._refuse_extras({name: value for name, value in inputs.items() if name not in known})
        batch = len(known[self._io.latents])
        if batch not in self._sessions:
            self._sessions[batch] = Stepper(self._engines, self.program, self._io, batch=batch)
        session = self._sessions[batch]
        latents = known.pop(self._io.latents)
        if step == 0:
            self._check_schedule()
            session.begin(known)
        velocity = session.velocity(step, latents).to(inputs[self._io.latents].dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _check_schedule(self) -> None:
        sigmas = self._scheduler.sigmas.float().cpu().numpy()
        if len(sigmas) != self.program.num_steps + 1:
            raise InputError(
                f"num_inference_steps is {len(sigmas) - 1}; this pipeline was accelerated for {self.program.num_steps} steps"
            )
        if not np.allclose(sigmas, self.program.sigmas, atol=1e-5):
            raise InputError("the scheduler's noise levels are not those that this pipeline was accelerated for")

    def _refuse_extras(self, extras: Mapping[str, Any]) -> None:
        expected = {self._io.timestep, "img_ids", "txt_ids"}
        strange = [name for name, value in extras.items() if name not in expected and value is not None and value != {}]
        if strange:
            raise InputError(f"the accelerated transformer does not take {', '.join(sorted(strange))}: take it off the call")
