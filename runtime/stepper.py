"""Play a program back for a sampler outside: it brings the latents of each step and gets a velocity.

``B`` batch. What is forecast is the model's answer, not the latents: a sampler, or whoever stands beside it, may change these
between steps, and the next answer is an answer to them.
"""

from collections import deque
from collections.abc import Mapping

from cachec.runtime.binding import Binding, not_finite
from cachec.runtime.device import Buffer
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import Program


class Stepper:
    """One request at a time: ``begin``, then ``velocity`` for each step in order.

    On the hidden cut a run of forecasts is one call, whose velocities are handed out step by step. On the output cut every
    step gets ``rows_out[step] @ slots + share_out[step] * latents``: for a sampler of Euler's kind the mean velocity of the
    gap, which brings it to where the program moves.

    Conditions and latents are what a ``Session`` takes.

    Raises:
        InputError: the engines were built without velocities, or for another batch.
    """

    def __init__(self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int = 1) -> None:
        self.program = program
        self._binding = Binding(engines, program, io, batch=batch, for_sampler=True)
        self._device = self._binding.device
        self._step = program.num_steps  # the next one
        self._position = 0  # of the next operation
        self._found: deque[Buffer] = deque()  # velocities of coming steps

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

    def begin(self, conditions: Mapping[str, Buffer], *, first: int | None = None) -> None:
        """Start a request, whatever became of the last one. Nothing changes unless all conditions fit.

        ``first``: the step to begin at, if not that of the program, whose steps must then stand alone.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite (looked at on the host);
                or the program cannot begin there.
        """
        start = self.program.key.start_step
        first = start if first is None else first
        if first != start and not (self.program.stands_alone and start < first < self.program.num_steps):
            raise InputError(f"the request begins at step {first}, but this program begins at step {start}")
        self.exchange(conditions)
        self._step = first
        self._position = next(i for i, one in enumerate(self._binding.operations) if first in one.steps)
        self._found.clear()

    def exchange(self, conditions: Mapping[str, Buffer]) -> None:
        """Go on with other conditions: engine calls from now on read them, what was forecast already stays.

        Raises:
            InputError: as for ``begin``.
        """
        self._binding.take(conditions)
        if self._binding.prologue is not None:
            self._binding.prologue.run()

    def velocity(self, step: int, latents: Buffer) -> Buffer:
        """The velocity [B, …] at ``step`` and ``latents``: a buffer of the engines' device, a numpy array on the CPU.

        It has memory of its own, which later steps leave alone.

        Raises:
            InputError: another step is next, or the latents do not fit.
            EngineError: it holds NaN or infinity. On devices that work beside the host only the last step is looked at, and
                what it started from, since looking waits.
        """
        if step != self.next_step:
            due = "no step" if self.next_step is None else f"step {self.next_step}"
            raise InputError(f"step {step} was asked for, but {due} is next: take the steps in order, after begin()")
        self._binding.take_latents(latents)
        while not self._found:
            operation = self._binding.operations[self._position]
            operation.call.run()
            self._position += 1
            self._found.extend(operation.velocities)
        self._step += 1
        velocity = self._found.popleft()
        self._look(step, velocity)
        return self._device.copy(velocity)

    def _look(self, step: int, velocity: Buffer) -> None:
        level, is_last = self.program.key.level, self.next_step is None
        if (is_last or not self._device.beside_host) and not self._device.is_finite(velocity):
            raise not_finite("the velocities", level, f"at step {step}")
        if is_last and not self._device.is_finite(self._binding.noise):
            raise not_finite("the latents that came in", level, f"at step {step}")
