"""From a program to a plan: which buffers a session needs, and which part of which one every engine call reads and writes.

Nothing here touches a device. ``B`` batch, ``S`` slots, ``T`` steps, ``H`` written slots, ``n`` forecasts of one instruction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from cachec.runtime.abi import (
    BATCH,
    BIAS,
    COEFFICIENTS,
    DELTA,
    DELTAS,
    FEATURE,
    FEATURES,
    FORECASTS,
    HISTORY_STEPS,
    NEXT_LATENTS,
    NOISE,
    SIGMAS,
    STEP,
    STEPS_OF,
    TIMESTEPS_OF,
    VELOCITIES,
    VELOCITY,
    history_name,
    hoisted_name,
)
from cachec.runtime.device import ALIGNMENT
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.program import Advance, Compute, Forecast, Instruction, Predict, Program
from cachec.runtime.specs import Array, Signature, TensorSpec, itemsize

RING, NOISE_BUFFER, TURNS, VELOCITY_BUFFER = "ring", "noise", ("latents/0", "latents/1"), "velocity"

DTYPE_NAMES = {np.dtype(name): name for name in ("float32", "int64")}  # of constants; numpy takes long to say them


def condition_name(name: str) -> str:
    """Name of the buffer that holds the condition ``name``."""
    return f"condition/{name}"


@dataclass(frozen=True)
class ModelIO:
    """Which engine input plays which part.

    ``latents`` and ``timestep`` change with every step; ``conditions`` (prompt, guidance) are given once per request.
    """

    latents: str
    timestep: str
    conditions: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PlannedBuffer:
    """A C-contiguous buffer; ``value`` is what it holds for good, if it is a constant of the program."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: Array | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class View:
    """A buffer; or its row ``start``, without the first axis; or its rows from ``start`` to ``stop``."""

    buffer: str
    start: int | None = None
    stop: int | None = None

    def rows(self, length: int) -> range:
        """Which of the ``length`` rows of the buffer it covers."""
        if self.start is None:
            return range(length)
        return range(self.start, self.start + 1 if self.stop is None else self.stop)


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """One engine call, its tensors by name.

    ``latents`` is what it starts from, ``velocities`` what it leaves, by step, if asked for; the prologue has neither.
    """

    engine: str
    steps: tuple[int, ...]
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]
    latents: View | None = None
    velocities: View | None = None


@dataclass(frozen=True, eq=False)
class BindingPlan:
    """All buffers of a session, by name, and all calls of a request, in order; ``final``: where the latents end up.

    ``ring`` [S, B, …] keeps features or velocities; ``noise`` and two more buffers [B, …] hold latents in turn, since an
    engine must not write what it reads. ``conditions`` are those that a request brings; their buffers have ``condition_name``.
    """

    buffers: Mapping[str, PlannedBuffer]
    prologue: PlannedCall | None
    operations: tuple[PlannedCall, ...]
    final: View
    latent_spec: TensorSpec
    conditions: tuple[TensorSpec, ...]

    @property
    def calls(self) -> tuple[PlannedCall, ...]:
        """The prologue, if there is one, and all operations."""
        return self.operations if self.prologue is None else (self.prologue, *self.operations)

    def shape(self, view: View) -> tuple[int, ...]:
        whole = self.buffers[view.buffer].shape
        if view.start is None:
            return whole
        return whole[1:] if view.stop is None else (len(view.rows(whole[0])), *whole[1:])

    def begin(self, view: View) -> int:
        """Where it begins in its buffer, in bytes."""
        buffer = self.buffers[view.buffer]
        return 0 if not view.start else view.start * (buffer.nbytes // buffer.shape[0])

    def is_aligned(self, view: View) -> bool:
        """Does it begin at a multiple of ``ALIGNMENT``, as its buffer does? Rows in the midst of a buffer may not."""
        return self.begin(view) % ALIGNMENT == 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies in one piece of memory, in bytes: constants first, scratch memory of the engines last."""

    offsets: Mapping[str, int]
    constant_bytes: int
    scratch_offset: int
    scratch_bytes: int

    @property
    def size(self) -> int:
        return self.scratch_offset + self.scratch_bytes


def lay_out(plan: BindingPlan, scratch_bytes: int = 0) -> Layout:
    """Put the buffers one after another, each at a multiple of ``ALIGNMENT``."""
    offsets, end, constant_bytes = {}, 0, 0
    for buffer in sorted(plan.buffers.values(), key=lambda buffer: buffer.value is None):
        offsets[buffer.name] = end
        end = _aligned(end + buffer.nbytes)
        constant_bytes = end if buffer.value is not None else constant_bytes
    return Layout(offsets, constant_bytes, end, scratch_bytes)


def constant_data(plan: BindingPlan, layout: Layout) -> Array:
    """What lies in the first ``layout.constant_bytes`` [bytes] uint8."""
    data = np.zeros(layout.constant_bytes, np.uint8)
    for buffer in plan.buffers.values():
        if buffer.value is not None:
            begin = layout.offsets[buffer.name]
            data[begin : begin + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)[...] = buffer.value
    return data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_binding(
    signatures: Mapping[str, Signature], program: Program, io: ModelIO, *, batch: int, with_velocities: bool = False
) -> BindingPlan:
    """The plan of a session. ``with_velocities``: forecasts also leave their velocities.

    Raises:
        BundleError: the program forecasts, and there is no engine for it.
        InputError: velocities are wanted, and the engines hand out none.
    """
    return _Planner(signatures, program, io, batch, with_velocities).plan()


class _Planner:
    """Buffers and calls found so far."""

    def __init__(
        self, signatures: Mapping[str, Signature], program: Program, io: ModelIO, batch: int, with_velocities: bool
    ) -> None:
        self._signatures, self._program, self._io = signatures, program, io
        self._sizes, self._with_velocities = {BATCH: batch}, with_velocities
        self._deltas = np.diff(program.sigmas)
        self._timesteps = np.broadcast_to(program.timesteps[:, None], (program.num_steps, batch))
        self._hoisted = {spec.name: spec for spec in signatures["prologue"].outputs} if "prologue" in signatures else {}
        forecasts = (i for i in program.instructions if isinstance(i, Forecast | Predict))
        self._computed, self._forecast = program.compute_steps, tuple(s for i in forecasts for s in i.steps)
        self._number = {step: number for some in (self._computed, self._forecast) for number, step in enumerate(some)}
        self._buffers: dict[str, PlannedBuffer] = {}
        self._moves = 0

    def plan(self) -> BindingPlan:
        compute = self._signatures["compute"]
        latents, feature, velocity = compute.input(self._io.latents), compute.output(FEATURE), compute.output(VELOCITY)
        kept = feature if self._program.cut == "hidden" else velocity
        self._add(RING, (self._program.capacity, *kept.resolve(self._sizes)), kept.dtype)
        for name in (NOISE_BUFFER, *TURNS):
            self._add_like(name, latents)
        self._add_like(VELOCITY_BUFFER, velocity)
        specs = {spec.name: spec for signature in self._signatures.values() for spec in signature.inputs}
        given = tuple(specs[name] for name in self._io.conditions if name in specs)  # the conditions that any engine reads
        self._conditions = {spec.name: self._add_like(condition_name(spec.name), spec) for spec in given}
        prologue = self._plan_prologue()
        operations = tuple(self._plan_call(instruction) for instruction in self._program.instructions)
        return BindingPlan(self._buffers, prologue, operations, self._latents(), latents, given)

    def _add(self, name: str, shape: tuple[int, ...], dtype: str, value: Array | None = None) -> View:
        self._buffers[name] = PlannedBuffer(name, shape, dtype, value)
        return View(name)

    def _add_like(self, name: str, spec: TensorSpec, **sizes: int) -> View:
        return self._add(name, spec.resolve({**self._sizes, **sizes}), spec.dtype)

    def _latents(self) -> View:
        """Where the latents are after the moves so far."""
        return View(TURNS[(self._moves - 1) % 2] if self._moves else NOISE_BUFFER)

    def _next_latents(self) -> View:
        """Where the next move puts them."""
        self._moves += 1
        return self._latents()

    def _plan_prologue(self) -> PlannedCall | None:
        """Everything that does not depend on latents, for all steps of the program."""
        if "prologue" not in self._signatures:
            return None
        steps = {STEPS_OF["compute"]: self._computed, STEPS_OF["forecast"]: self._forecast or (0,)}
        times = {TIMESTEPS_OF[name]: self._program.timesteps[list(steps[STEPS_OF[name]])] for name in TIMESTEPS_OF}
        sizes = {name: len(some) for name, some in steps.items()}
        outputs = {name: self._add_like(f"hoisted/{name}", spec, **sizes) for name, spec in self._hoisted.items()}
        return self._call("prologue", (), self._conditions, times, outputs)

    def _plan_call(self, instruction: Instruction) -> PlannedCall:
        if isinstance(instruction, Compute):
            return self._plan_compute(instruction)
        if isinstance(instruction, Advance):
            return self._plan_advance(instruction)
        if "forecast" not in self._signatures:
            raise BundleError("the program forecasts, but the bundle has no forecast engine: compile it again")
        return self._plan_forecast(instruction) if isinstance(instruction, Forecast) else self._plan_predict(instruction)

    def _plan_compute(self, instruction: Compute) -> PlannedCall:
        step, hidden = instruction.step, self._program.cut == "hidden"
        latents = self._latents()
        results = {VELOCITY: View(VELOCITY_BUFFER)}
        if instruction.slot is not None:
            results[FEATURE if hidden else VELOCITY] = View(RING, instruction.slot)
        if hidden:
            results[NEXT_LATENTS] = self._next_latents()
        inputs = {self._io.latents: latents, **self._conditions, **self._rows("compute", self._number[step], None)}
        return self._call("compute", (step,), inputs, self._at_step(step), results, latents, results[VELOCITY])

    def _plan_advance(self, instruction: Advance) -> PlannedCall:
        row = self._program.coefficients[instruction.steps[0], : instruction.num_slots]
        inputs = {NOISE: View(NOISE_BUFFER), VELOCITIES: View(RING, 0, instruction.num_slots)}
        latents = self._latents()
        results = {NEXT_LATENTS: self._next_latents()}
        return self._call("advance", instruction.steps, inputs, {COEFFICIENTS: row}, results, latents)

    def _plan_forecast(self, instruction: Forecast) -> PlannedCall:
        steps, written = instruction.steps, instruction.num_slots  # slots behind it may hold anything: never bound
        rows = slice(steps[0], steps[-1] + 1)
        first = self._number[steps[0]]
        latents = self._latents()
        inputs = {
            FEATURES: View(RING, 0, written),
            self._io.latents: latents,
            **self._conditions,
            **self._rows("forecast", first, first + len(steps)),
        }
        constants = {
            COEFFICIENTS: self._program.coefficients[rows, :written],
            BIAS: self._program.bias[rows],
            DELTAS: self._deltas[rows],
            self._io.timestep: self._timesteps[rows],
        }
        results = {NEXT_LATENTS: self._next_latents()}
        if self._with_velocities:
            spec = self._velocities_spec()
            results[VELOCITIES] = self._add_like(f"velocities/{steps[0]}", spec, **{FORECASTS: len(steps)})
        return self._call("forecast", steps, inputs, constants, results, latents, results.get(VELOCITIES))

    def _velocities_spec(self) -> TensorSpec:
        signature = self._signatures["forecast"]
        if VELOCITIES not in {spec.name for spec in signature.outputs}:
            raise InputError("a sampler outside needs velocities, which these engines keep to themselves: "
                             "compile the bundle with --velocities")  # fmt: skip
        return signature.output(VELOCITIES)

    def _plan_predict(self, instruction: Predict) -> PlannedCall:
        step, latents = instruction.step, self._latents()
        inputs = {
            **{history_name(i): View(RING, slot) for i, slot in enumerate(instruction.sources)},
            self._io.latents: latents,
            **self._conditions,
            **self._rows("forecast", self._number[step], None),
        }
        constants = {
            SIGMAS: self._program.sigmas,
            STEP: np.array(step, np.int64),
            HISTORY_STEPS: np.array(instruction.source_steps, np.int64),
            **self._at_step(step),
        }
        results = {VELOCITY: View(VELOCITY_BUFFER), NEXT_LATENTS: self._next_latents()}
        if instruction.slot is not None:
            results[FEATURE] = View(RING, instruction.slot)
        return self._call("forecast", (step,), inputs, constants, results, latents, results[VELOCITY])

    def _at_step(self, step: int) -> dict[str, Array]:
        return {self._io.timestep: self._timesteps[step], DELTA: self._deltas[step : step + 1]}

    def _rows(self, engine: str, first: int, end: int | None) -> dict[str, View]:
        """What the prologue made for an engine: its rows from ``first`` to ``end``, or the one row without an ``end``."""
        result = {}
        for spec in self._signatures[engine].inputs:
            name = hoisted_name(engine, spec.name)
            if name in self._hoisted:
                by_step = self._hoisted[name].shape[0] == STEPS_OF[engine]
                result[spec.name] = View(f"hoisted/{name}", first, end) if by_step else View(f"hoisted/{name}")
        return result

    def _call(
        self,
        engine: str,
        steps: tuple[int, ...],
        inputs: Mapping[str, View],
        constants: Mapping[str, Array],
        results: Mapping[str, View],
        latents: View | None = None,
        velocities: View | None = None,
    ) -> PlannedCall:
        """A call with those of the inputs that the engine has; each constant gets a buffer of its own."""
        known = dict(inputs)
        wanted = [spec.name for spec in self._signatures[engine].inputs]
        for name in wanted:
            if name in constants:
                value = constants[name]
                place = f"{engine}/{steps[0]}/{name}" if steps else f"{engine}/{name}"
                known[name] = self._add(place, value.shape, DTYPE_NAMES[value.dtype], value)
        return PlannedCall(engine, steps, {name: known[name] for name in wanted if name in known}, results, latents, velocities)
