"""The evaluator of built engines: a session of them, without torch.

Shapes: as ``evaluator.py``.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from cachec.compiler.calibration.evaluator import Conditions, Evaluator, Numbers, Time
from cachec.runtime.abi import (
    BATCH,
    COMPUTE,
    EXPERT,
    FEATURE,
    FEATURES,
    FORECAST,
    GUIDANCE,
    GUIDE,
    MAX_BATCH,
    NEGATIVE,
    POSITIVE,
    PROLOGUE,
    TARGET_TIMESTEP,
    VELOCITY,
    negative_name,
    timesteps_of,
)
from cachec.runtime.binding import Binding
from cachec.runtime.device import CPU
from cachec.runtime.engine import Engine, ExecutionContext
from cachec.runtime.errors import InputError
from cachec.runtime.instructions import Compute, Forecast, Instruction
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import UNCACHED, Program, ProgramKey, hash_sigmas
from cachec.runtime.session import LoadedBundle, Session
from cachec.runtime.specs import Array, itemsize


class EngineEvaluator(Evaluator):
    """Engines of one target of a bundle. Keeps the sessions of the Program that was played last."""

    name: ClassVar[str] = "a built engine"

    def __init__(
        self,
        engines: Mapping[str, Engine],
        io: ModelIO,
        *,
        device: str = CPU,
        precision: str = "float32",
        max_batch: int = MAX_BATCH,
    ) -> None:
        self._engines, self._io = engines, io
        self.device, self.precision, self.max_batch = device, precision, max_batch
        forecast = engines.get(FORECAST)
        self._has_tail = forecast is not None and FEATURES in {spec.name for spec in forecast.signature.inputs}
        first = {spec.name for name in (PROLOGUE, COMPUTE) if name in engines for spec in engines[name].signature.inputs}
        self._told_twice = bool(first & {TARGET_TIMESTEP, timesteps_of(COMPUTE, second=True)})
        self._guide: ExecutionContext | None = None
        self._played: Program | None = None
        self._sessions: dict[int, Session] = {}
        self._bindings: dict[int, Binding] = {}

    @classmethod
    def of(cls, bundle: LoadedBundle) -> "EngineEvaluator":
        """The engines of an opened bundle.

        Raises:
            InputError: they take batches of one size only, or store features in fewer bits than they compute in.
        """
        target, compute = bundle.target, bundle.engines[COMPUTE]
        if EXPERT in bundle.engines:
            raise InputError("the bundle has two transformers, and its engines cannot be calibrated with: pass --model")
        if (batch := bundle.programs[UNCACHED].key.batch) is not None:
            raise InputError(f"the bundle takes batches of {batch} only: compile one without --batch")
        kept = next((spec.dtype for spec in compute.signature.outputs if spec.name == FEATURE), target.precision)
        if itemsize(kept) < itemsize(target.precision):
            raise InputError(f"the bundle stores features in {kept}, which rounds them: compile one without --slots")
        return cls(
            bundle.engines,
            bundle.io,
            device=str(compute.device.name),
            precision=target.precision,
            max_batch=target.sizes.get(BATCH, (MAX_BATCH,))[-1],
        )

    def evaluate(self, x: Array, t: Time, conditions: Conditions) -> tuple[Array, Array]:
        if GUIDANCE not in conditions:
            return self._evaluate(x, t, conditions)
        velocity, feature = self._evaluate(np.concatenate([x, x]), _twice(t), self._both(conditions))
        return self._combined(velocity, conditions[GUIDANCE]), np.concatenate(np.split(feature, 2), axis=1)

    def _evaluate(self, x: Array, t: Time, conditions: Conditions) -> tuple[Array, Array]:
        binding = self._bound(len(x))
        binding.take(_given(conditions))
        compute, velocities, features = binding.operations[0], [], []
        for told, rows in _by_time(t, conditions, len(x)):
            self._tell(binding, *told)
            binding.take_latents(x)
            compute.call.run()
            velocities.append((rows, binding.device.download(compute.velocities[0])))
            features.append((rows, binding.device.download(binding.slots[FEATURE])[0]))
        return _joined(velocities), _joined(features)

    def tail(self, feature: Array, t: Time, conditions: Conditions) -> Array:
        if not self._has_tail:
            raise InputError("these engines have no tail: on the output cut, and where a predictor is inside, none is built")
        if GUIDANCE not in conditions:
            return self._tail(feature, t, conditions)
        rows = np.concatenate(np.split(feature, 2, axis=1))
        return self._combined(self._tail(rows, _twice(t), self._both(conditions)), conditions[GUIDANCE])

    def _tail(self, feature: Array, t: Time, conditions: Conditions) -> Array:
        binding = self._bound(len(feature))
        binding.take(_given(conditions))
        binding.device.upload(np.ascontiguousarray(feature[None]), binding.slots[FEATURE])
        forecast, velocities = binding.operations[1], []
        for told, rows in _by_time(t, conditions, len(feature)):
            self._tell(binding, *told)
            forecast.call.run()
            velocities.append((rows, binding.device.download(forecast.velocities[0])))
        return _joined(velocities)

    def play(
        self, program: Program, noise: Array, conditions: Conditions, *, coefficients: Numbers = None, timesteps: Numbers = None
    ) -> Array:
        if program is not self._played:
            self._played, self._sessions = program, {}
        batch = len(noise)
        if batch not in self._sessions:
            self._sessions[batch] = Session(self._engines, program, self._io, batch=batch)
        session = self._sessions[batch]
        session.take_numbers(coefficients=coefficients, timesteps=timesteps)
        latents: Array = session.run(conditions, noise)
        return latents

    def _both(self, conditions: Conditions) -> dict[str, Array]:
        """Those of the negative branch, then those of the positive one: the engines take both as rows of one batch."""
        names = self._io.conditions
        both = {name: np.concatenate([conditions[negative_name(name)], conditions[name]]) for name in names}
        told = [conditions[TARGET_TIMESTEP]] * 2 if TARGET_TIMESTEP in conditions else []
        return {**both, TARGET_TIMESTEP: np.concatenate(told)} if told else both

    def _combined(self, velocity: Array, scale: Array) -> Array:
        """One velocity [B, …] of the branches' [2 B, …], by the engine that combines them."""
        guide = self._engines[GUIDE]
        device = guide.device.for_session()
        values = dict(zip((NEGATIVE, POSITIVE), np.split(velocity, 2), strict=True)) | {GUIDANCE: scale}
        inputs = {name: device.empty(value.shape, str(value.dtype)) for name, value in values.items()}
        for name, value in values.items():
            device.upload(np.ascontiguousarray(value), inputs[name])
        combined = device.empty(values[POSITIVE].shape, "float32")
        self._guide = self._guide or guide.context(device)  # which some back ends take long to make
        self._guide.bind(inputs, {VELOCITY: combined}).run()
        result: Array = device.download(combined)
        return result

    def _bound(self, batch: int) -> Binding:
        if batch not in self._bindings:
            program = _probe(self._has_tail, told_twice=self._told_twice)
            self._bindings = {batch: Binding(self._engines, program, self._io, batch=batch, for_sampler=True)}
        return self._bindings[batch]

    def _tell(self, binding: Binding, t: float, target: float | None) -> None:
        targets = None if target is None else np.full(2, target, np.float32)
        binding.take_numbers(timesteps=np.full(2, t, np.float32), targets=targets)
        if binding.prologue is not None:
            binding.prologue.run()


def _probe(forecasts: bool, *, told_twice: bool) -> Program:
    """One computed step, whose feature is kept, and one forecast that repeats it: the whole model, and its tail."""
    sigmas = np.array([1.0, 0.5, 0.0], np.float32)
    second: Instruction = Forecast((1,), 1) if forecasts else Compute(1)
    return Program(
        key=ProgramKey(2, hash_sigmas(sigmas), {}),
        instructions=(Compute(0, 0), second),
        slots={FEATURE: 1},
        sigmas=sigmas,
        timesteps=sigmas[:-1],
        coefficients=np.array([[[0.0]], [[1.0]]], np.float32),
        bias=np.zeros(2, np.float32),
        target_timesteps=sigmas[1:] if told_twice else None,
    )


def _by_time(t: Time, conditions: Conditions, batch: int) -> list[tuple[tuple[float, float | None], Array]]:
    """The different times that are told, and which rows of the batch each is for: a program tells all rows the same.

    Each with the second time of a flow map, if there is one.
    """
    times = np.broadcast_to(np.asarray(t, np.float64), (batch,)).tolist()
    targets = conditions[TARGET_TIMESTEP].tolist() if TARGET_TIMESTEP in conditions else [None] * batch
    told = list(zip(times, targets, strict=True))
    return [(one, np.array([row for row, other in enumerate(told) if other == one])) for one in dict.fromkeys(told)]


def _given(conditions: Conditions) -> dict[str, Array]:
    """What a request brings: all but the second time, which Programs tell."""
    return {name: value for name, value in conditions.items() if name != TARGET_TIMESTEP}


def _twice(t: Time) -> Time:
    """What both branches' rows are told."""
    return np.concatenate([t, t]) if isinstance(t, np.ndarray) and t.ndim else t


def _joined(parts: list[tuple[Array, Array]]) -> Array:
    """Each batch's own rows of it, float32 whatever the engines' precision."""
    result = np.empty(parts[0][1].shape, np.float32)
    for rows, values in parts:
        result[rows] = values[rows]
    return result
