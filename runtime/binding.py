"""A plan made real: buffers on the engines' device, and every call of a request bound to them before the first one comes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cachec.runtime.abi import BATCH, MAX_BATCH
from cachec.runtime.device import Buffer
from cachec.runtime.engine import Call, Engine
from cachec.runtime.errors import InputError, NotFiniteError, cannot_be_pickled
from cachec.runtime.model_io import ModelIO
from cachec.runtime.plan import (
    BindingPlan,
    PlannedAside,
    PlannedCall,
    Slot,
    View,
    constant_data,
    lay_out,
    part_of,
    slots_name,
)
from cachec.runtime.plan_buffers import tables_of
from cachec.runtime.planner import plan_binding
from cachec.runtime.program import Program
from cachec.runtime.specs import Array, TensorSpec


@dataclass(frozen=True, eq=False)
class Operation:
    """One engine call. ``latents`` is the buffer that it starts from, ``velocities`` what a sampler outside gets, by step.

    ``reads``, ``keeps``, ``computed``: see ``PlannedCall``.
    """

    engine: str
    steps: tuple[int, ...]
    call: Call
    latents: Buffer
    velocities: tuple[Buffer, ...] = ()
    reads: tuple[Mapping[Slot, int], ...] = ()
    keeps: Mapping[Slot, int] = field(default_factory=dict)
    computed: Buffer | None = None


@dataclass(frozen=True, eq=False)
class Aside:
    """A compute graph that is told any time: ``told`` takes it, the ``calls`` leave the ``velocity``."""

    told: tuple[Buffer, ...]
    calls: tuple[Call, ...]
    velocity: Buffer


def not_finite(what: str, level: str, where: str) -> NotFiniteError:
    """An error for results that nobody can use."""
    return NotFiniteError(
        f"level {level}: {what} hold NaN or infinity {where}. Take another level or other conditions, or compile the bundle in "
        "a type of wider range (--dtype float32 or bfloat16)"
    )


class Binding:
    """Buffers of one session, the calls on them (see ``BindingPlan``), and the way in for what a request brings.

    All buffers, and the scratch memory that the engines share, lie in one piece of memory, which is filled with zeros.

    Raises:
        InputError: the program or the engines do not take such a batch, or hand out no velocities ``for_sampler``.
    """

    def __init__(
        self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int, for_sampler: bool = False
    ) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
        if program.key.batch not in (None, batch):
            raise InputError(f"batch is {batch}; this bundle was compiled for batches of {program.key.batch}")
        signatures = {name: engine.signature for name, engine in engines.items()}
        self._plan = partial(plan_binding, signatures, io=io, batch=batch, for_sampler=for_sampler, tables=tables_of(engines))
        plan = self._plan(program)
        self.device = next(iter(engines.values())).device.for_session()
        self._contexts = {name: engine.context(self.device) for name, engine in engines.items()}
        layout = lay_out(plan, max(self._scratch_bytes(plan, call) for call in plan.calls))
        memory = self.device.empty((layout.size,), "uint8")
        self._layout, self._constants = layout, memory[: layout.constant_bytes]
        self.device.upload(constant_data(plan, layout), self._constants)
        self._buffers = {
            name: self.device.part(memory, layout.offsets[name], buffer.shape, buffer.dtype)
            for name, buffer in plan.buffers.items()
        }
        if layout.scratch_bytes:
            for context in self._contexts.values():
                context.scratch = memory[layout.scratch_offset :]
        self.slots = {kind: self._buffers[slots_name(kind)] for kind in program.slots}
        self.latent_spec, self._check_names = plan.latent_spec, plan.check_names
        self._given = {name: (spec, self._part(view)) for name, (spec, view) in plan.given.items()}
        self._noises = [self._part(view) for view in plan.noises]
        self.noise = self._noises[0]
        self.prologue = None if plan.prologue is None else self._bind(plan.prologue)
        self.by_instruction = [[self._operation(call) for call in calls] for calls in plan.by_instruction]
        self.asides = {graph: self._aside(one) for graph, one in plan.asides.items()}
        self.final = self._part(plan.final)
        self._sizes, self._program, self._others = {BATCH: batch}, program, False

    @property
    def operations(self) -> list[Operation]:
        """Those of all instructions, in order."""
        return [operation for some in self.by_instruction for operation in some]

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a request brings besides noise, by name."""
        return tuple(self._given)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents, batch first."""
        return self.latent_spec.resolve(self._sizes)

    def __reduce__(self) -> str:
        raise cannot_be_pickled("a session", "load the bundle in the other process, and make one there")

    def take(self, conditions: Mapping[str, Buffer], latents: Buffer | None = None) -> None:
        """Copy a request's conditions, and latents if given, to where the calls read them; nothing unless all of them fit.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite (looked at on the host).
        """
        self._check_names(conditions)
        given = [(spec, conditions[name], buffer) for name, (spec, buffer) in self._given.items()]
        if latents is not None:
            given += [(self.latent_spec, latents, buffer) for buffer in self._noises]
        adopted = [(self._adopt(spec, value), buffer) for spec, value, buffer in given]
        for value, buffer in adopted:
            self.device.upload(value, buffer)

    def take_latents(self, latents: Buffer) -> None:
        """Copy latents to where the first call reads them; with a sampler outside, all calls do.

        Raises:
            InputError: they do not fit.
        """
        adopted = self._adopt(self.latent_spec, latents)
        for buffer in self._noises:
            self.device.upload(adopted, buffer)

    def take_numbers(
        self, *, coefficients: Array | None = None, timesteps: Array | None = None, targets: Array | None = None
    ) -> None:
        """Let the calls read other rows or told times than the program's, or its own again. Nothing is bound anew."""
        others = any(one is not None for one in (coefficients, timesteps, targets))
        if others or self._others:
            plan = self._plan(self._program.with_numbers(coefficients=coefficients, timesteps=timesteps, targets=targets))
            self.device.upload(constant_data(plan, self._layout), self._constants)
        self._others = others

    def _adopt(self, spec: TensorSpec, value: Buffer) -> Buffer:
        """What can be copied to the device, if it fits ``spec``."""
        value = self.device.adopt(value)
        try:
            if isinstance(value, np.ndarray) or not self.device.owns(value):
                spec.check(value, self._sizes)
            else:
                spec.check_form(value, self._sizes)
        except InputError as error:
            if tuple(getattr(value, "shape", ())) == spec.resolve(self._sizes):
                raise
            raise InputError(
                f"{error}; this session takes batches of {self._sizes[BATCH]}, and its bundle was compiled for "
                f"{self._program.key.sizes_text}"
            ) from error
        return value

    def _scratch_bytes(self, plan: BindingPlan, planned: PlannedCall) -> int:
        shapes = {name: plan.shape(view) for name, view in planned.inputs.items()}
        return self._contexts[planned.engine].scratch_bytes(shapes)

    def _part(self, view: View) -> Buffer:
        return part_of(self._buffers[view.buffer], view)

    def _bind(self, planned: PlannedCall) -> Call:
        inputs, outputs = (
            {name: self._part(view) for name, view in side.items()} for side in (planned.inputs, planned.outputs)
        )
        return self._contexts[planned.engine].bind(inputs, outputs)

    def _operation(self, planned: PlannedCall) -> Operation:
        if planned.latents is None:
            raise ValueError(f"the call of {planned.engine} at {planned.steps} starts from no latents")
        return Operation(
            engine=planned.engine,
            steps=planned.steps,
            call=self._bind(planned),
            latents=self._part(planned.latents),
            velocities=tuple(self._part(view) for view in planned.velocities),
            reads=planned.reads,
            keeps=planned.keeps,
            computed=None if planned.computed is None else self._part(planned.computed),
        )

    def _aside(self, planned: PlannedAside) -> Aside:
        told, calls = (self._buffers[name] for name in planned.told), map(self._bind, planned.calls)
        return Aside(tuple(told), tuple(calls), self._part(planned.velocity))
