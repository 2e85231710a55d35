"""The transformer of an accelerated pipeline. It believes nothing: each call says where the run is.

What differs from what was compiled, or from what the run began with, is used where the program allows it, and else refused in
that call, in words of the pipeline's user. ``B`` batch, ``T`` steps.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from cachec.compiler.fingerprint import Fingerprint
from cachec.compiler.stand_in import BACK, StandIn
from cachec.engines.torch_device import neutral_modes
from cachec.runtime.abi import COMPUTE
from cachec.runtime.engine import Engine
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import Program
from cachec.runtime.specs import Array
from cachec.runtime.stepper import Stepper

ROUNDING = 1e-5  # of timesteps in float32, whichever way they were calculated
NOISE_LEVELS = 1e-5  # by which sigmas may differ


@dataclass(frozen=True, eq=False)
class Compiled:
    """What a pipeline was compiled to. ``baked``: inputs that are constants of the graphs. See ``LoadedModel``.

    ``timesteps`` [T] are those that the pipeline's sampler hands over; the program may tell the model others.
    """

    engines: Mapping[str, Engine]
    program: Program
    timesteps: Array
    io: ModelIO
    baked: Mapping[str, torch.Tensor]
    sizes_of: Callable[[str, torch.Tensor], Mapping[str, Any]]
    check_scheduler: Callable[[Any], None]


@dataclass(eq=False)
class _Run:
    """One run of a sampler: ``step`` is the last one that was answered; ``ids`` are the baked inputs as they were handed in.

    ``conditions`` are those in use; ``expected`` is where an Euler step from the last answer leads.
    """

    stepper: Stepper
    conditions: dict[str, torch.Tensor]
    ids: list[Any]
    context: str | None
    step: int
    expected: torch.Tensor | None = None


class AcceleratedTransformer(StandIn):
    """Answers calls from engines and a program. ``original``: what stood there.

    Not thread-safe: calls at the same time are refused. A refusal ends the run; the next one starts as if it had not been.
    """

    def __init__(self, original: nn.Module, pipeline: Any, compiled: Compiled) -> None:
        super().__init__(original)
        self.program = compiled.program
        self._compiled = compiled
        self._pipeline = weakref.ref(pipeline)
        self._signature = inspect.signature(original.forward)
        self._dtype = next(original.parameters()).dtype
        self._fingerprint = Fingerprint.of(original)
        self._steppers: dict[int, Stepper] = {}
        self._run: _Run | None = None
        self._context: str | None = None
        self._lock = threading.Lock()

    # --- the call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **keywords: Any) -> Any:
        """The velocity at the step whose ``timestep`` is handed in, from the transformer's usual arguments.

        Raises:
            InputError: something is not as it was compiled, or not as this run began.
            EngineError: the velocity is not finite.
        """
        if not self._lock.acquire(blocking=False):
            raise InputError(
                "the accelerated transformer is in a call already, from another thread: it has the state of one run; "
                "accelerate a pipeline for each thread, or let one wait for the other"
            )
        try:
            wants_gradients = torch.is_grad_enabled()
            with neutral_modes(self._compiled.engines[COMPUTE].device.name), torch.no_grad():
                return self._answer(self._bind(args, keywords), wants_gradients=wants_gradients)
        except BaseException:
            self._run = None  # no later step goes on from what failed
            raise
        finally:
            self._lock.release()

    def _answer(self, given: dict[str, Any], *, wants_gradients: bool) -> Any:
        io = self._compiled.io
        self._check_baked(given)
        self._check_tensors(given, wants_gradients=wants_gradients)
        latents, conditions = given[io.latents], {name: given[name].float() for name in io.conditions}
        near, due = self._near_steps(given), None if self._run is None else self._run.step + 1
        if due in near and self._is_same_run(given):
            step = due
            run = self._follow(step, conditions)
        else:
            first = self.program.key.start_step
            step = first if first in near else near[0]
            run = self._begin(step, given, conditions)
        try:
            velocity = run.stepper.velocity(step, latents.float())
        except EngineError as error:
            raise EngineError(f"accelerated in {str(self._dtype).removeprefix('torch.')}: {error}") from error
        sigmas = self.program.sigmas
        run.step, run.expected = step, latents.float() + float(sigmas[step + 1] - sigmas[step]) * velocity
        self._run = run
        answer = velocity.to(latents.dtype)
        return Transformer2DModelOutput(sample=answer) if given["return_dict"] else (answer,)

    def _bind(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, as the original takes them; those that it takes and this does not are refused unless empty."""
        try:
            bound = self._signature.bind(*args, **keywords)
        except TypeError as error:
            raise InputError(f"the transformer does not take this call: {error}") from error
        bound.apply_defaults()
        given, io = bound.arguments, self._compiled.io
        taken = {io.latents, io.timestep, *io.conditions, *self._compiled.baked, "return_dict"}
        strange = []
        for name, value in given.items():
            default = self._signature.parameters[name].default
            if name not in taken and value is not None and value is not default and value != {}:
                strange.append(f"{name} ({', '.join(map(str, value))})" if isinstance(value, Mapping) else name)
        if strange:
            raise InputError(
                f"the accelerated transformer does not take {', '.join(sorted(strange))}: take it off the call, or {BACK}"
            )
        return dict(given)

    def _check_baked(self, given: Mapping[str, Any]) -> None:
        """Ids and the like are constants of the graphs."""
        for name, baked in self._compiled.baked.items():
            value = given[name]
            if not isinstance(value, torch.Tensor):
                raise InputError(f"{name} is missing: the transformer's pipeline hands it over at every call")
            value = value[0] if value.ndim == baked.ndim + 1 else value  # one for each sample, as older pipelines do
            if value.shape == baked.shape and bool((value.to(baked.device, baked.dtype) == baked).all()):
                continue
            got, wanted = (self._compiled.sizes_of(name, tensor) for tensor in (value, baked))
            if got == wanted:
                raise InputError(f"{name} are not the positions that this pipeline was accelerated for: {_said(wanted)}")
            raise InputError(
                f"the call has {_said(got)}; this pipeline was accelerated for {_said(wanted)}: call it so, or {BACK} and "
                "accelerate it for the other size"
            )

    def _check_tensors(self, given: Mapping[str, Any], *, wants_gradients: bool) -> None:
        io, device = self._compiled.io, self._compiled.engines[COMPUTE].device
        tensors = {name: given[name] for name in (io.latents, io.timestep, *io.conditions)}
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                said = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(f"{name} is {said}; the accelerated transformer takes a tensor of floating-point numbers")
        if strange := [name for name, value in tensors.items() if name != io.timestep and not device.owns(value)]:
            raise InputError(
                f"{', '.join(strange)} are not on {device.name}, where this pipeline was accelerated: move it back, or {BACK} "
                "and accelerate it again"
            )
        if not bool(torch.stack([value.isfinite().all() for name, value in tensors.items() if name != io.timestep]).all()):
            strange = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
            raise InputError(f"{', '.join(strange)} hold NaN or infinity: look at what made or edited them")
        if wants_gradients and (strange := [name for name, value in tensors.items() if value.requires_grad]):
            raise InputError(f"{', '.join(strange)} want gradients, and an accelerated transformer gives none: {BACK}")

    # --- where the run is

    def _near_steps(self, given: Mapping[str, Any]) -> list[int]:
        """The steps that ``timestep`` may be of, nearest first: one, or in bfloat16 a few."""
        io, timesteps = self._compiled.io, self._compiled.timesteps
        told = given[io.timestep].reshape(-1)
        value, precision = float(told[0]), max(torch.finfo(given[name].dtype).eps for name in (io.timestep, io.latents))
        if not bool((told == told[0]).all()):
            raise InputError(f"the timesteps of one call differ: {', '.join(f'{float(one):.4g}' for one in told)}")
        distances = np.abs(timesteps - value)
        nearest = [int(step) for step in np.argsort(distances, kind="stable")]
        near = [step for step in nearest if distances[step] <= ROUNDING + precision * timesteps[step]]
        if not near:
            raise InputError(
                f"timestep {value:.6g} is none of the {self.program.num_steps} that this pipeline was accelerated for (the "
                f"nearest is {timesteps[nearest[0]]:.6g}, of step {nearest[0]}): num_inference_steps, sigmas or the scheduler "
                f"are others. Call it as it was accelerated, or {BACK}"
            )
        return near

    def _is_same_run(self, given: Mapping[str, Any]) -> bool:
        """Does this call go on with the run? It has an id of that run (pipelines make them anew), or its latents lead on."""
        run, latents = self._run, given[self._compiled.io.latents]
        if run is None or any(given[name] is one for name, one in zip(self._compiled.baked, run.ids, strict=True)):
            return run is not None
        if run.expected is None or run.expected.shape != latents.shape:
            return False
        tolerance = 8 * torch.finfo(latents.dtype).eps * float(run.expected.abs().max())
        return bool((latents.float() - run.expected).abs().max() <= tolerance)

    def _begin(self, step: int, given: Mapping[str, Any], conditions: dict[str, torch.Tensor]) -> _Run:
        """A new run, if this is its first step."""
        self._check_order(step, given, conditions)
        if (change := self._fingerprint.change(self.original)) is not None:
            raise InputError(
                f"{change} since this pipeline was accelerated. What was compiled from it would not follow, or only in part: "
                f"{BACK}, make it as it shall be, and accelerate it again"
            )
        self._check_scheduler()
        compiled, batch = self._compiled, len(given[self._compiled.io.latents])
        if batch not in self._steppers:
            self._steppers[batch] = Stepper(compiled.engines, self.program, compiled.io, batch=batch)
        stepper = self._steppers[batch]
        stepper.begin(conditions, first=step)
        return _Run(stepper, _copied(conditions), [given[name] for name in compiled.baked], self._context, step)

    def _check_order(self, step: int, given: Mapping[str, Any], conditions: Mapping[str, torch.Tensor]) -> None:
        """Refuse a step that does not begin a run."""
        run, first = self._run, self.program.key.start_step
        if run is not None and run.step == step and self._is_other_branch(given, conditions):
            raise InputError(
                f"step {step} was asked for twice with different prompts, as negative_prompt with true_cfg_scale above 1 does: "
                f"an accelerated pipeline takes one prompt a step. Leave them out, or {BACK}"
            )
        if step == first:
            return
        if run is None or not self._is_same_run(given):
            return
        what = "again" if step == run.step else "before its time" if step > run.step else "a second time"
        raise InputError(
            f"step {step} was asked for {what}, after step {run.step}: the sampler must take all steps in order, once each, as "
            f"FlowMatchEulerDiscreteScheduler does. Exchange the scheduler, or {BACK}"
        )

    def _is_other_branch(self, given: Mapping[str, Any], conditions: Mapping[str, torch.Tensor]) -> bool:
        """Is this the second call of the same step, for the other prompt of guidance?"""
        run = self._run
        if run is None or run.step == self.program.num_steps - 1:
            return False
        if self._context != run.context:
            return True
        same_ids = any(given[name] is one for name, one in zip(self._compiled.baked, run.ids, strict=True))
        return same_ids and bool(self._changed(run, conditions))

    def _follow(self, step: int, conditions: dict[str, torch.Tensor]) -> _Run:
        """The run so far, with the conditions of now."""
        run = self._run
        assert run is not None, "only a run can be followed"
        if self._context != run.context:
            raise InputError(
                f"this run began under cache_context {run.context!r} and goes on under {self._context!r}, as negative_prompt "
                f"with true_cfg_scale above 1 does: leave them out, or {BACK}"
            )
        if not self._fingerprint.is_untouched:
            raise InputError(f"weights were changed in place in the middle of a run: {BACK}, and accelerate it again")
        if not (changed := self._changed(run, conditions)):
            return run
        if step in self.program.compute_steps:
            run.stepper.exchange(conditions)
            run.conditions = _copied(conditions)
        elif step > self.program.compute_steps[-1]:
            raise InputError(
                f"{', '.join(changed)} changed at step {step}, and no step is computed after {self.program.compute_steps[-1]}: "
                f"exchange it earlier, or {BACK}"
            )
        return run

    def _changed(self, run: _Run, conditions: Mapping[str, torch.Tensor]) -> list[str]:
        return [name for name, value in conditions.items() if not torch.equal(value, run.conditions[name])]

    def _check_scheduler(self) -> None:
        """Look at the scheduler of the pipeline that was accelerated, if it is at the start of a run: then this is its run."""
        pipeline = self._pipeline()
        if pipeline is None or pipeline.transformer is not self:
            return
        scheduler = pipeline.scheduler
        steps = getattr(scheduler, "num_inference_steps", None)
        if steps is None or getattr(scheduler, "step_index", None) is not None:
            return
        self._compiled.check_scheduler(scheduler)
        sigmas, wanted = scheduler.sigmas.float().cpu().numpy(), self.program.sigmas
        if len(sigmas) != len(wanted):
            raise InputError(
                f"num_inference_steps is {steps}; this pipeline was accelerated for {self.program.num_steps} steps: call it "
                f"with that many, or {BACK} and accelerate it for {steps}"
            )
        if (off := np.abs(sigmas - wanted)).max() > NOISE_LEVELS:
            step = int(off.argmax())
            raise InputError(
                f"the scheduler's noise levels are not those that this pipeline was accelerated for ({sigmas[step]:.6g} at "
                f"step {step}, not {wanted[step]:.6g}): take sigmas off the call, give the scheduler its settings again, "
                f"or {BACK}"
            )

    @contextmanager
    def cache_context(self, name: str, **_details: Any) -> Iterator[None]:
        """Which prompt the calls inside are for; a run has one."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Pipelines call it when they are done."""
        self._run = None


def _said(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
