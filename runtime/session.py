"""Sessions: play a program back on two engines.

``B`` batch, ``S`` slots; everything a request needs lies in buffers that its session owns, so sessions of one bundle
never share state and may be interleaved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from cachec.runtime.bundle import Bundle, Manifest
from cachec.runtime.engine import (
    BIAS,
    COEFFICIENTS,
    FEATURE,
    FEATURES,
    HISTORY_STEPS,
    SIGMAS,
    STEP,
    VELOCITY,
    Engine,
    history_name,
)
from cachec.runtime.errors import BundleError, InputError, unknown_name
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED, Advance, Compute, Forecast, Instruction, Predict, Program
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class ModelIO:
    """Which engine input plays which part.

    ``latents`` and ``timestep`` change with every step; ``conditions`` (prompt, guidance) are given once per request.
    """

    latents: str
    timestep: str
    conditions: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["latents"], data["timestep"], tuple(data["conditions"]))


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle with its engines loaded; a context manager. Open one with ``cachec.load``."""

    manifest: Manifest
    programs: Mapping[str, Program]
    engines: Mapping[str, Engine]

    @property
    def io(self) -> ModelIO:
        return ModelIO.from_json(self.manifest.io)

    @property
    def default_level(self) -> str:
        """The bundle's first level that is not the uncached one."""
        return next((level for level in self.programs if level != UNCACHED), UNCACHED)

    def session(self, *, batch: int = 1, level: str | None = None) -> "Session":
        """A session for requests of ``batch`` samples at a quality level, by default the bundle's first."""
        return Session(self.engines, self.programs[self.check_level(level)], self.io, batch=batch)

    def check_level(self, level: str | None) -> str:
        """The level, or the default one for ``None``.

        Raises:
            InputError: the bundle has no such level.
        """
        level = self.default_level if level is None else level
        if level not in self.programs:
            raise unknown_name("level", level, self.programs)
        return level

    def denoise(self, conditions: Mapping[str, Array], seeds: Sequence[int], *, level: str | None = None) -> Array:
        """Latents for ``len(seeds)`` samples, in one batch; conditions have that batch size."""
        session = self.session(batch=len(seeds), level=level)
        return session.run(conditions, np.stack([make_noise(seed, session.latent_shape[1:]) for seed in seeds]))

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load_bundle(bundle: Bundle, engine_type: type[Engine], *, threads: int | None = None) -> LoadedBundle:
    """Load the engines of an opened bundle with its back end's engine class."""
    programs = {level: bundle.program(level) for level in bundle.manifest.programs}
    engines = {
        name: engine_type.load(bundle.path(artifact.path), artifact.signature, threads=threads)
        for name, artifact in bundle.target.engines.items()
    }
    return LoadedBundle(bundle.manifest, programs, engines)


class Session:
    """One request at a time: ``begin``, then ``advance`` until ``finished``; or ``run``, which does all of it."""

    def __init__(self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int = 1) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        if program.key.batch not in (None, batch):
            raise InputError(f"batch is {batch}; this bundle was compiled for batches of {program.key.batch}")
        compute = engines["compute"].signature
        self.program = program
        self.io = io
        self._sizes = {"batch": batch}
        self._compute = engines["compute"].context()
        self._forecast = engines["forecast"].context() if "forecast" in engines else None
        self._forecast_inputs = {s.name for s in engines["forecast"].signature.inputs} if "forecast" in engines else set()
        self._condition_specs = [compute.input(name) for name in io.conditions]
        self._latent_spec = compute.input(io.latents)
        feature, velocity = compute.output(FEATURE), compute.output(VELOCITY)
        kept = feature if program.cut == "hidden" else velocity
        self.ring = np.zeros((program.capacity, *kept.resolve(self._sizes)), kept.dtype)
        self._noise = np.zeros(self.latent_shape, self._latent_spec.dtype)
        self._latents = np.zeros(self.latent_shape, self._latent_spec.dtype)
        self._velocity = np.zeros_like(self._latents)
        self._scratch = np.zeros(feature.resolve(self._sizes), feature.dtype)  # a feature that nothing reads
        timestep = compute.input(io.timestep)
        self._timesteps = np.repeat(program.timesteps[:, None].astype(timestep.dtype), batch, axis=1)
        self._conditions = {s.name: np.zeros(s.resolve(self._sizes), s.dtype) for s in self._condition_specs}
        self._position = len(program.instructions)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents, batch first."""
        return self._latent_spec.resolve(self._sizes)

    @property
    def finished(self) -> bool:
        return self._position == len(self.program.instructions)

    @property
    def latents(self) -> Array:
        """The current latents; a view that the next step overwrites."""
        return self._latents

    def begin(self, conditions: Mapping[str, Array], noise: Array) -> None:
        """Start a request. Nothing of the session changes unless all inputs fit.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite.
        """
        expected = {spec.name for spec in self._condition_specs}
        if set(conditions) != expected:
            raise InputError(f"conditions are {sorted(expected)}, got {sorted(conditions)}")
        for spec in self._condition_specs:
            spec.check(conditions[spec.name], self._sizes)
        self._latent_spec.check(noise, self._sizes)
        for name, value in conditions.items():
            np.copyto(self._conditions[name], value)
        np.copyto(self._noise, noise)
        np.copyto(self._latents, noise)
        self._position = 0

    def advance(self) -> None:
        """Carry out the next instruction."""
        if self.finished:
            raise InputError("this request is finished: call begin() with new noise first")
        self._execute(self.program.instructions[self._position])
        self._position += 1

    def run(self, conditions: Mapping[str, Array], noise: Array) -> Array:
        """From noise to latents. Returns a copy that later requests leave alone."""
        self.begin(conditions, noise)
        while not self.finished:
            self.advance()
        return self._latents.copy()

    def _execute(self, instruction: Instruction) -> None:
        if isinstance(instruction, Compute):
            self._evaluate(instruction)
            return
        if isinstance(instruction, Advance):
            self._move(instruction)
            return
        for step in instruction.steps:
            if isinstance(instruction, Forecast):
                inputs, outputs = self._bind_forecast(instruction, step)
            else:
                inputs, outputs = self._bind_predict(instruction)
            if self._forecast is None:
                raise BundleError("the program forecasts, but the bundle has no forecast engine: compile it again")
            self._forecast.run(self._with_conditions(inputs, step), {VELOCITY: self._velocity, **outputs})
            self._integrate(step)

    def _evaluate(self, instruction: Compute) -> None:
        feature, velocity = self._scratch, self._velocity
        if instruction.slot is not None and self.program.cut == "hidden":
            feature = self.ring[instruction.slot]
        elif instruction.slot is not None:
            velocity = self.ring[instruction.slot]
        inputs = {
            self.io.latents: self._latents,
            self.io.timestep: self._timesteps[instruction.step],
            **self._conditions,
        }
        self._compute.run(inputs, {VELOCITY: velocity, FEATURE: feature})
        if self.program.cut == "hidden":
            self._integrate(instruction.step)

    def _move(self, instruction: Advance) -> None:
        """Noise plus weighted velocities, in place; slots behind the written ones may hold anything, so they are not read."""
        written = instruction.num_slots
        weights = self.program.coefficients[instruction.steps[0], :written].astype(self.ring.dtype)
        np.dot(weights, self.ring[:written].reshape(written, -1), out=self._velocity.reshape(-1))
        np.add(self._noise, self._velocity, out=self._latents)

    def _bind_forecast(self, instruction: Forecast, step: int) -> tuple[dict[str, Array], dict[str, Array]]:
        written = instruction.num_slots  # slots behind it may hold anything, so they are never bound
        return {
            FEATURES: self.ring[:written],
            COEFFICIENTS: self.program.coefficients[step, :written],
            BIAS: self.program.bias[step : step + 1].reshape(()),
        }, {}

    def _bind_predict(self, instruction: Predict) -> tuple[dict[str, Array], dict[str, Array]]:
        sources = {history_name(i): self.ring[slot] for i, slot in enumerate(instruction.sources)}
        schedule = {
            SIGMAS: self.program.sigmas,
            STEP: np.array(instruction.step, np.int64),
            HISTORY_STEPS: np.array(instruction.source_steps, np.int64),
        }
        feature = self._scratch if instruction.slot is None else self.ring[instruction.slot]
        read = {name: value for name, value in schedule.items() if name in self._forecast_inputs}
        return {**sources, **read}, {FEATURE: feature}

    def _with_conditions(self, inputs: dict[str, Array], step: int) -> dict[str, Array]:
        known = {**self._conditions, self.io.timestep: self._timesteps[step], self.io.latents: self._latents}
        return {**inputs, **{name: value for name, value in known.items() if name in self._forecast_inputs}}

    def _integrate(self, step: int) -> None:
        """Euler step of the flow, in place: x += (sigma_next - sigma) v."""
        sigmas = self.program.sigmas
        np.multiply(self._velocity, sigmas[step + 1] - sigmas[step], out=self._velocity)
        np.add(self._latents, self._velocity, out=self._latents)
