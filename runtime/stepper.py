"""Play a program back for a sampler outside: it brings the latents of each step and gets a velocity.

``B`` batch. What is forecast is the model's answer, not the latents: a sampler, or whoever stands beside it, may change these
between steps, and the next answer is an answer to them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cachec.runtime.binding import Binding, Operation, not_finite
from cachec.runtime.device import Buffer
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.plan import Slot
from cachec.runtime.program import Program


class Stepper:
    """One request at a time: ``begin``, then ``velocity`` for each step in order, or ``compute`` for any other time.

    On the hidden cut a run of forecasts is one call, whose velocities are handed out step by step. On the output cut every
    step gets ``rows_out[step] @ slots + share_out[step] * latents``: for a sampler of Euler's kind the mean velocity of the
    gap, which brings it to where the program moves.

    A forecast is made of what this request computed at the program's own steps, or not at all: where one of these is missing,
    since the request began later or asked for another time in between, the step is computed instead and no slot is written.

    Conditions and latents are what a ``Session`` takes.

    Raises:
        InputError: the engines were built without velocities, or for another batch.
    """

    def __init__(self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int = 1) -> None:
        self.program = program
        self._binding = Binding(engines, program, io, batch=batch, for_sampler=True)
        self._device = self._binding.device
        self._step = program.num_steps  # the next one
        self._by_step: dict[int, list[Operation]] = {}
        self._operations = self._binding.operations
        for operation in self._operations:
            for step in operation.steps:
                self._by_step.setdefault(step, []).append(operation)
        self._found: dict[int, Buffer] = {}  # velocities of coming steps
        self._holds: dict[Slot, int] = {}  # the steps that this request's slots are of
        self._forecasts = True  # is it known where the sampler is, so that forecasts of the program mean something?

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents, batch first."""
        return self._binding.latent_shape

    @property
    def slots(self) -> Mapping[str, Buffer]:
        """The slots [S, B, …] by kind."""
        return self._binding.slots

    @property
    def next_step(self) -> int | None:
        """The step whose velocity is to be asked for next; ``None`` before ``begin`` and after the last one."""
        return self._step if self._step < self.program.num_steps else None

    def takes(self, value: Any) -> bool:
        """Is ``value`` a buffer of the device, so that it need not come from elsewhere?"""
        return self._device.owns(value)

    def begin(self, conditions: Mapping[str, Buffer], *, first: int | None = None) -> None:
        """Start a request, whatever became of the last one. Nothing changes unless all conditions fit.

        ``first``: the step to begin at, if not that of the program.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite (looked at on the host);
                or the program has no such step.
        """
        start = self.program.key.start_step
        first = start if first is None else first
        if not start <= first < self.program.num_steps:
            raise InputError(
                f"the request begins at step {first}; this program has steps {start} to {self.program.num_steps - 1}"
            )
        self.exchange(conditions)
        self._step, self._forecasts = first, True
        self._found.clear()
        self._holds.clear()

    def exchange(self, conditions: Mapping[str, Buffer]) -> None:
        """Go on with other conditions: engine calls from now on read them, what was forecast already stays.

        Raises:
            InputError: as for ``begin``.
        """
        self._binding.take(conditions)
        if self._binding.prologue is not None:
            self._binding.prologue.run()

    def velocity(self, step: int, latents: Buffer, *, told: float | None = None, graph: str | None = None) -> Buffer:
        """The velocity [B, …] at ``step`` and ``latents``: a buffer of the engines' device, a numpy array on the CPU.

        It has memory of its own, which later steps leave alone. Where the step is computed in place of what the program has:
        ``told`` is what the model is told, if not what the program tells it, and ``graph`` the engine that computes.

        Raises:
            InputError: another step is next, or the latents do not fit.
            EngineError: it holds NaN or infinity. On devices that work beside the host only the last step is looked at, and
                what it started from, since looking waits.
        """
        if step != self.next_step:
            due = "no step" if self.next_step is None else f"step {self.next_step}"
            raise InputError(f"step {step} was asked for, but {due} is next: take the steps in order, after begin()")
        self._binding.take_latents(latents)
        told = float(self.program.timesteps[step]) if told is None else told
        velocity = self._answer(step, told, graph or self._graph(step))
        self._step += 1
        self._look(velocity, f"at step {step}", is_last=self.next_step is None)
        return self._device.copy(velocity)

    def compute(self, timestep: float, latents: Buffer, *, graph: str | None = None) -> Buffer:
        """The velocity [B, …] that the model gives where it is told ``timestep``, which need be none of the program's.

        No slot is written. Steps of the program up to its next computed one are computed then; on the output cut all of them,
        for what is handed out there depends on where the sampler was at every step.

        ``graph``: the engine that computes, if not the one of the program's next step.

        Raises:
            InputError: the latents do not fit, or the model is told two times.
            EngineError: as for ``velocity``; a device that works beside the host is not waited for.
        """
        self._binding.take_latents(latents)
        self._forecasts = False
        velocity = self._compute(timestep, graph or self._graph(min(self._step, self.program.num_steps - 1)))
        self._look(velocity, f"at time {timestep:.6g}", is_last=False)
        return self._device.copy(velocity)

    def _answer(self, step: int, told: float, graph: str) -> Buffer:
        """As the program has it if this request holds what that takes, else computed."""
        *before, answering = self._by_step[step]
        computing = next((one for one in (*before, answering) if one.computed is not None), None)
        if computing is not None:
            self._run(computing)
            self._forecasts |= self.program.rows_out is None
            if computing is answering:
                return computing.computed
        needed = answering.reads[answering.steps.index(step)]
        if not (self._forecasts and needed.items() <= self._holds.items()):
            if computing is not None and np.float32(told) == self.program.timesteps[step]:
                return computing.computed
            return self._compute(told, graph)
        if step not in self._found:
            self._run(answering)
            self._found.update(zip(answering.steps, answering.velocities, strict=True))
        return self._found.pop(step)

    def _run(self, operation: Operation) -> None:
        operation.call.run()
        self._holds.update(operation.keeps)

    def _graph(self, step: int) -> str:
        """The engine of the last step up to ``step`` that the program computes."""
        return [one.engine for one in self._operations if one.computed is not None and one.steps[0] <= step][-1]

    def _compute(self, timestep: float, graph: str) -> Buffer:
        aside = self._binding.asides.get(graph)
        if aside is None:
            raise InputError(
                f"time {timestep:.6g} cannot be computed: the model is told a second time besides, of this program"
            )
        for buffer in aside.told:
            self._device.upload(np.full(buffer.shape, timestep, np.float32), buffer)
        for call in aside.calls:
            call.run()
        return aside.velocity

    def _look(self, velocity: Buffer, where: str, *, is_last: bool) -> None:
        level = self.program.key.level
        if (is_last or not self._device.beside_host) and not self._device.is_finite(velocity):
            raise not_finite("the velocities", level, where)
        if is_last and not self._device.is_finite(self._binding.noise):
            raise not_finite("the latents that came in", level, where)
