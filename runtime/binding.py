"""From a program to calls: every engine call of a request, bound to its buffers before the first request comes.

``B`` batch, ``S`` slots, ``T`` steps, ``K`` computed steps, ``N`` forecast steps, ``n`` forecasts of one instruction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cachec.runtime.device import Buffer
from cachec.runtime.engine import (
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
    Call,
    Engine,
    history_name,
    hoisted_name,
)
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.program import Advance, Compute, Forecast, Instruction, Predict, Program
from cachec.runtime.specs import Array, TensorSpec


@dataclass(frozen=True)
class ModelIO:
    """Which engine input plays which part.

    ``latents`` and ``timestep`` change with every step; ``conditions`` (prompt, guidance) are given once per request.
    """

    latents: str
    timestep: str
    conditions: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """One engine call. ``latents`` is the buffer that it starts from, ``velocities`` what it leaves, by step, if asked for."""

    engine: str
    steps: tuple[int, ...]
    call: Call
    latents: Buffer
    velocities: Buffer | None = None


class Binding:
    """Buffers of one session, and the calls on them.

    ``ring`` [S, B, …] keeps features or velocities; ``noise`` and two more buffers [B, …] hold latents in turn, since an
    engine must not write what it reads. ``with_velocities``: forecasts also leave their velocities.
    """

    def __init__(
        self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int, with_velocities: bool = False
    ) -> None:
        self._engines, self._program, self._io = engines, program, io
        self._contexts = {name: engine.context() for name, engine in engines.items()}
        self._sizes = {BATCH: batch}
        self._with_velocities = with_velocities
        self.device = engines["compute"].device
        compute = engines["compute"].signature
        self.latent_spec = compute.input(io.latents)
        feature, velocity = compute.output(FEATURE), compute.output(VELOCITY)
        kept = feature if program.cut == "hidden" else velocity
        self.ring = self._empty(kept, leading=(program.capacity,))
        self.noise, *self._turns = (self._empty(self.latent_spec) for _ in range(3))
        self._velocity = self._empty(velocity)
        self.condition_specs = self._condition_specs()
        self.conditions = {spec.name: self._empty(spec) for spec in self.condition_specs}
        self._deltas = np.diff(program.sigmas)
        self._timesteps = np.repeat(program.timesteps[:, None], batch, axis=1)
        self.hoisted: dict[str, Buffer] = {}
        self.prologue = self._bind_prologue()
        self._moves = 0
        self.operations = [self._bind(instruction) for instruction in program.instructions]
        self.final = self._latents()

    def _condition_specs(self) -> list[TensorSpec]:
        """What a request brings: the conditions that any engine reads."""
        specs = {spec.name: spec for engine in self._engines.values() for spec in engine.signature.inputs}
        return [specs[name] for name in self._io.conditions if name in specs]

    def _empty(self, spec: TensorSpec, leading: tuple[int, ...] = (), sizes: Mapping[str, int] | None = None) -> Buffer:
        return self.device.empty((*leading, *spec.resolve({**self._sizes, **(sizes or {})})), spec.dtype)

    def _data(self, value: Array) -> Buffer:
        """A constant of the program on the device; each in a buffer of its own, since GPUs want their data aligned."""
        value = np.asarray(value, order="C")
        buffer = self.device.empty(value.shape, str(value.dtype))
        self.device.upload(value, buffer)
        return buffer

    def _latents(self) -> Buffer:
        """Where the latents are after the moves so far."""
        return self._turns[(self._moves - 1) % 2] if self._moves else self.noise

    def _next_latents(self) -> Buffer:
        """Where the next move puts them."""
        self._moves += 1
        return self._latents()

    def _bind_prologue(self) -> Call | None:
        """Everything that does not depend on latents, for all steps of the program."""
        if "prologue" not in self._engines:
            return None
        signature = self._engines["prologue"].signature
        steps = {STEPS_OF["compute"]: self._program.compute_steps, STEPS_OF["forecast"]: self._forecast_steps() or (0,)}
        times = {TIMESTEPS_OF[name]: self._data(self._program.timesteps[list(steps[STEPS_OF[name]])]) for name in TIMESTEPS_OF}
        sizes = {name: len(some) for name, some in steps.items()}
        self.hoisted = {spec.name: self._empty(spec, sizes=sizes) for spec in signature.outputs}
        known = {**self.conditions, **times}
        return self._contexts["prologue"].bind({s.name: known[s.name] for s in signature.inputs}, self.hoisted)

    def _forecast_steps(self) -> tuple[int, ...]:
        return tuple(s for i in self._program.instructions if isinstance(i, Forecast | Predict) for s in i.steps)

    def _bind(self, instruction: Instruction) -> Operation:
        if isinstance(instruction, Compute):
            return self._bind_compute(instruction)
        if isinstance(instruction, Advance):
            return self._bind_advance(instruction)
        if "forecast" not in self._engines:
            raise BundleError("the program forecasts, but the bundle has no forecast engine: compile it again")
        return self._bind_forecast(instruction) if isinstance(instruction, Forecast) else self._bind_predict(instruction)

    def _bind_compute(self, instruction: Compute) -> Operation:
        step, hidden = instruction.step, self._program.cut == "hidden"
        latents = self._latents()
        results = {VELOCITY: self._velocity}
        if instruction.slot is not None:
            results[FEATURE if hidden else VELOCITY] = self.ring[instruction.slot]
        if hidden:
            results[NEXT_LATENTS] = self._next_latents()
        number = self._program.compute_steps.index(step)
        inputs = {**self._at_step(step, latents), **self._rows("compute", number, None)}
        return self._operation("compute", instruction.steps, inputs, results, latents, results[VELOCITY])

    def _bind_advance(self, instruction: Advance) -> Operation:
        row = self._program.coefficients[instruction.steps[0], : instruction.num_slots]
        inputs = {NOISE: self.noise, VELOCITIES: self.ring[: instruction.num_slots], COEFFICIENTS: self._data(row)}
        latents = self._latents()
        return self._operation("advance", instruction.steps, inputs, {NEXT_LATENTS: self._next_latents()}, latents)

    def _bind_forecast(self, instruction: Forecast) -> Operation:
        steps, written = instruction.steps, instruction.num_slots  # slots behind it may hold anything: never bound
        rows = slice(steps[0], steps[-1] + 1)
        first = self._forecast_steps().index(steps[0])
        latents = self._latents()
        inputs = {
            FEATURES: self.ring[:written],
            COEFFICIENTS: self._data(self._program.coefficients[rows, :written]),
            BIAS: self._data(self._program.bias[rows]),
            DELTAS: self._data(self._deltas[rows]),
            self._io.latents: latents,
            self._io.timestep: self._data(self._timesteps[rows]),
            **self.conditions,
            **self._rows("forecast", first, first + len(steps)),
        }
        results = {NEXT_LATENTS: self._next_latents()}
        if self._with_velocities:
            spec = self._velocities_spec()
            results[VELOCITIES] = self._empty(spec, sizes={FORECASTS: len(steps)})
        return self._operation("forecast", steps, inputs, results, latents, results.get(VELOCITIES))

    def _velocities_spec(self) -> TensorSpec:
        signature = self._engines["forecast"].signature
        if VELOCITIES not in {spec.name for spec in signature.outputs}:
            raise InputError("a sampler outside needs velocities, which these engines keep to themselves: "
                             "compile the bundle with --velocities")  # fmt: skip
        return signature.output(VELOCITIES)

    def _bind_predict(self, instruction: Predict) -> Operation:
        latents = self._latents()
        inputs = {
            **{history_name(i): self.ring[slot] for i, slot in enumerate(instruction.sources)},
            SIGMAS: self._data(self._program.sigmas),
            STEP: self._data(np.array(instruction.step, np.int64)),
            HISTORY_STEPS: self._data(np.array(instruction.source_steps, np.int64)),
            **self._at_step(instruction.step, latents),
            **self._rows("forecast", self._forecast_steps().index(instruction.step), None),
        }
        results = {VELOCITY: self._velocity, NEXT_LATENTS: self._next_latents()}
        if instruction.slot is not None:
            results[FEATURE] = self.ring[instruction.slot]
        return self._operation("forecast", instruction.steps, inputs, results, latents, self._velocity)

    def _at_step(self, step: int, latents: Buffer) -> dict[str, Buffer]:
        return {
            self._io.latents: latents,
            self._io.timestep: self._data(self._timesteps[step]),
            DELTA: self._data(self._deltas[step : step + 1]),
            **self.conditions,
        }

    def _rows(self, engine: str, first: int, end: int | None) -> dict[str, Buffer]:
        """What the prologue made for an engine: its rows from ``first`` to ``end``, or the one row without an ``end``."""
        if "prologue" not in self._engines:
            return {}
        result = {}
        specs = {spec.name: spec for spec in self._engines["prologue"].signature.outputs}
        for spec in self._engines[engine].signature.inputs:
            name = hoisted_name(engine, spec.name)
            if name in specs:
                value = self.hoisted[name]
                by_step = specs[name].shape[0] == STEPS_OF[engine]
                result[spec.name] = value if not by_step else value[first] if end is None else value[first:end]
        return result

    def _operation(
        self,
        engine: str,
        steps: tuple[int, ...],
        inputs: Mapping[str, Buffer],
        results: Mapping[str, Buffer],
        latents: Buffer,
        velocities: Buffer | None = None,
    ) -> Operation:
        wanted = {spec.name for spec in self._engines[engine].signature.inputs}
        call = self._contexts[engine].bind({name: value for name, value in inputs.items() if name in wanted}, results)
        return Operation(engine, steps, call, latents, velocities)
