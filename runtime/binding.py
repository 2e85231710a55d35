"""A plan made real: buffers on the engines' device, and every call of a request bound to them before the first one comes."""

from collections.abc import Mapping
from dataclasses import dataclass

from cachec.runtime.device import Buffer
from cachec.runtime.engine import Call, Engine
from cachec.runtime.plan import (
    NOISE_BUFFER,
    RING,
    BindingPlan,
    ModelIO,
    PlannedCall,
    View,
    condition_name,
    constant_data,
    lay_out,
    plan_binding,
)
from cachec.runtime.program import Program


@dataclass(frozen=True, eq=False)
class Operation:
    """One engine call. ``latents`` is the buffer that it starts from, ``velocities`` what it leaves, by step, if asked for."""

    engine: str
    steps: tuple[int, ...]
    call: Call
    latents: Buffer
    velocities: Buffer | None = None


class Binding:
    """Buffers of one session, and the calls on them (see ``BindingPlan``).

    All buffers, and the scratch memory that the engines share, lie in one piece of memory, which is filled with zeros.
    """

    def __init__(
        self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int, with_velocities: bool = False
    ) -> None:
        signatures = {name: engine.signature for name, engine in engines.items()}
        plan = plan_binding(signatures, program, io, batch=batch, with_velocities=with_velocities)
        self.device = engines["compute"].device.for_session()
        self._contexts = {name: engine.context(self.device) for name, engine in engines.items()}
        layout = lay_out(plan, max(self._scratch_bytes(plan, call) for call in plan.calls))
        memory = self.device.empty((layout.size,), "uint8")
        self.device.upload(constant_data(plan, layout), memory[: layout.constant_bytes])
        self._buffers = {
            name: self.device.part(memory, layout.offsets[name], buffer.shape, buffer.dtype)
            for name, buffer in plan.buffers.items()
        }
        if layout.scratch_bytes:
            for context in self._contexts.values():
                context.scratch = memory[layout.scratch_offset :]
        self.ring, self.noise = self._buffers[RING], self._buffers[NOISE_BUFFER]
        self.latent_spec, self.condition_specs = plan.latent_spec, plan.conditions
        self.conditions = {spec.name: self._buffers[condition_name(spec.name)] for spec in plan.conditions}
        self.prologue = None if plan.prologue is None else self._bind(plan.prologue)
        self.operations = [self._operation(call) for call in plan.operations]
        self.final = self._part(plan.final)

    def _scratch_bytes(self, plan: BindingPlan, planned: PlannedCall) -> int:
        shapes = {name: plan.shape(view) for name, view in planned.inputs.items()}
        return self._contexts[planned.engine].scratch_bytes(shapes)

    def _part(self, view: View) -> Buffer:
        buffer = self._buffers[view.buffer]
        if view.start is None:
            return buffer
        return buffer[view.start] if view.stop is None else buffer[view.start : view.stop]

    def _bind(self, planned: PlannedCall) -> Call:
        inputs, outputs = (
            {name: self._part(view) for name, view in side.items()} for side in (planned.inputs, planned.outputs)
        )
        return self._contexts[planned.engine].bind(inputs, outputs)

    def _operation(self, planned: PlannedCall) -> Operation:
        if planned.latents is None:
            raise ValueError(f"the call of {planned.engine} at {planned.steps} starts from no latents")
        velocities = None if planned.velocities is None else self._part(planned.velocities)
        return Operation(planned.engine, planned.steps, self._bind(planned), self._part(planned.latents), velocities)
