"""The evaluator of prepared graphs: PyTorch on any device, with gradients.

Shapes: as ``evaluator.py``. Noise, latents, conditions and results cross between host and device; nothing else does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from cachec.compiler.calibration.evaluator import Conditions, Evaluator, Numbers, Time
from cachec.compiler.graphs.weights import Values
from cachec.engines.torch_device import watching_memory
from cachec.passes import Graphs
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import (
    ADVANCE,
    COMPUTE,
    FEATURE,
    FORECAST,
    HISTORY_STEPS,
    SIGMAS,
    STEP,
    VELOCITY,
    history_name,
)
from cachec.runtime.device import CPU
from cachec.runtime.errors import InputError
from cachec.runtime.instructions import Instruction
from cachec.runtime.model_io import ModelIO
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

LOW = (torch.float16, torch.bfloat16)
Tensors = Mapping[str, torch.Tensor]


class GraphEvaluator(Evaluator):
    """The split graphs, of ``precision``: the whole model, and its tail behind the cut, their weights on ``device``.

    ``inlined``: graphs with a predictor inside the forecast graph, for Programs that call one. ``max_batch``: samples that are
    run at once; more are run piece by piece.
    """

    name: ClassVar[str] = "PyTorch"
    differentiable: ClassVar[bool] = True

    def __init__(
        self,
        split: Graphs,
        io: ModelIO,
        inlined: Graphs | None = None,
        *,
        device: str = CPU,
        precision: str = "float32",
        max_batch: int | None = None,
    ) -> None:
        self.device, self.precision, self._max_batch = device, precision, max_batch
        self._io, self._device = io, torch.device(device)
        values = Values(self._device)
        what = f"the model's weights in {precision} on {device}"
        with watching_memory(what, "Stop what else uses it, or take a device with more memory"):
            split = values.graphs(split)
            inlined = None if inlined is None else values.graphs(inlined)
        feature = outputs(split.modules[COMPUTE])[FEATURE].meta.get("val")
        self._kept = None if feature is None else feature.dtype  # what graphs that were not captured give is taken as it is
        self._compute, self._behind = split.modules[COMPUTE], split.modules[FORECAST]
        self._predictor = None if inlined is None else inlined.modules[FORECAST]

    @torch.no_grad()
    def evaluate(self, x: Array, t: Time, conditions: Conditions) -> tuple[Array, Array]:
        def piece(rows: slice) -> tuple[Array, ...]:
            latents = self._there(x[rows])
            made = self._evaluate(latents, _told(_of(t, rows), latents), self._tensors(conditions, rows))
            return tuple(map(_back, made))

        velocity, feature = self._in_pieces(len(x), piece)
        return velocity, feature

    @torch.no_grad()
    def tail(self, feature: Array, t: Time, conditions: Conditions) -> Array:
        def piece(rows: slice) -> tuple[Array, ...]:
            value = self._there(feature[rows])
            return (_back(self._tail(value, _told(_of(t, rows), value), self._tensors(conditions, rows))),)

        return self._in_pieces(len(feature), piece)[0]

    def evaluate_with_gradients(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with watching_memory(f"{len(x)} samples of the model with gradients, in {self.precision} on {self.device}"):
            return self._evaluate(x, t.expand(len(x)), conditions)

    @torch.no_grad()
    def play(
        self, program: Program, noise: Array, conditions: Conditions, *, coefficients: Numbers = None, timesteps: Numbers = None
    ) -> Array:
        rows = program.coefficients if coefficients is None else coefficients
        told = program.timesteps if timesteps is None else timesteps

        def piece(some: slice) -> tuple[Array, ...]:
            loop = _Loop(self, program, self._there(noise[some]), self._tensors(conditions, some), rows, told)
            for instruction in program.instructions:
                loop.play(instruction)
            return (_back(loop.latents),)

        return self._in_pieces(len(noise), piece)[0]

    def _in_pieces(self, batch: int, run: Callable[[slice], tuple[Array, ...]]) -> tuple[Array, ...]:
        """``run`` on some samples after the other, and the results as one."""
        size = self._max_batch or batch
        with watching_memory(f"{min(size, batch)} samples of the model in {self.precision} on {self.device}"):
            parts = [run(slice(start, start + size)) for start in range(0, batch, size)]
        return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _there(self, value: Array) -> torch.Tensor:
        return torch.from_numpy(value).to(self._device)

    def _tensors(self, conditions: Conditions, rows: slice) -> dict[str, torch.Tensor]:
        return {name: self._there(value[rows]) for name, value in conditions.items()}

    def _evaluate(self, x: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._compute(**{self._io.latents: x, self._io.timestep: t, **conditions})
        return result[VELOCITY], result[FEATURE]

    def _tail(self, feature: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> torch.Tensor:
        feature = feature if self._kept is None else feature.to(self._kept)
        given = {**conditions, self._io.timestep: t, FEATURE: feature}
        velocity: torch.Tensor = _call(self._behind, given)[VELOCITY]
        return velocity

    def _predict(
        self, history: Tensors, x: torch.Tensor, t: torch.Tensor, conditions: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._predictor is None:
            raise InputError("the program calls a predictor inside its engine, and this evaluator was given none")
        known = {**conditions, **history, self._io.latents: x, self._io.timestep: t}
        result = _call(self._predictor, known)
        return result[VELOCITY], result[FEATURE]


class _Loop:
    """One closed loop: latents on their way, and what the slots hold."""

    def __init__(
        self,
        evaluator: GraphEvaluator,
        program: Program,
        noise: torch.Tensor,
        conditions: Tensors,
        coefficients: Array,
        timesteps: Array,
    ) -> None:
        self.latents = noise
        self._evaluator, self._conditions, self._noise = evaluator, conditions, noise
        self._rows, self._bias = (torch.from_numpy(a).to(noise) for a in (coefficients[:, 0], program.bias))
        self._sigmas, self._timesteps = program.sigmas, timesteps
        self._slots: dict[tuple[str, int], torch.Tensor] = {}
        self._kept: dict[tuple[str, int], int] = {}  # which step each slot is of

    def play(self, instruction: Instruction) -> None:
        """Carry out one instruction, by what it says of itself."""
        if instruction.computes:
            (step,) = instruction.steps
            self._keep(instruction, *self._evaluator._evaluate(self.latents, self._told(step), self._conditions))
        elif not instruction.rows:
            (step,) = instruction.steps
            history = self._history(step, instruction.reads[FEATURE])
            self._keep(instruction, *self._evaluator._predict(history, self.latents, self._told(step), self._conditions))
        elif instruction.graph == ADVANCE:
            self.latents = self._noise + self._weighted(instruction, instruction.rows[0], VELOCITY)
        else:
            for step in instruction.rows:
                feature = self._weighted(instruction, step, FEATURE) + self._bias[step]
                self._move(step, self._evaluator._tail(feature, self._told(step), self._conditions))

    def _keep(self, instruction: Instruction, velocity: torch.Tensor, feature: torch.Tensor) -> None:
        results = {VELOCITY: velocity, FEATURE: feature}
        for kind, slot in instruction.writes.items():
            self._slots[kind, slot], self._kept[kind, slot] = results[kind], instruction.steps[0]
        for step in instruction.moves:
            self._move(step, velocity)

    def _history(self, step: int, slots: Sequence[int]) -> Tensors:
        """What a predictor looks at, but for latents, told time and conditions."""
        schedule = {
            SIGMAS: torch.from_numpy(self._sigmas),
            STEP: torch.tensor(step),
            HISTORY_STEPS: torch.tensor([self._kept[FEATURE, slot] for slot in slots]),
        }
        features = {history_name(i): self._slots[FEATURE, slot] for i, slot in enumerate(slots)}
        return {**features, **{name: value.to(self._noise.device) for name, value in schedule.items()}}

    def _weighted(self, instruction: Instruction, step: int, kind: str) -> torch.Tensor:
        values = torch.stack([self._slots[kind, slot] for slot in instruction.reads[kind]]).to(self._rows.dtype)
        total: torch.Tensor = torch.tensordot(self._rows[step, : len(values)], values, 1)
        return total

    def _move(self, step: int, velocity: torch.Tensor) -> None:
        self.latents = self.latents + float(self._sigmas[step + 1] - self._sigmas[step]) * velocity

    def _told(self, step: int) -> torch.Tensor:
        return _told(self._timesteps[step], self._noise)


def _call(module: fx.GraphModule, known: Tensors) -> Mapping[str, torch.Tensor]:
    """Run a graph on those of the ``known`` tensors that it takes."""
    result: Mapping[str, torch.Tensor] = module(**{name: known[name] for name in placeholders(module) if name in known})
    return result


def _told(t: Time, like: torch.Tensor) -> torch.Tensor:
    """The told time as [B], in the precision of ``like`` [B, …] and where it is."""
    return torch.as_tensor(t, dtype=like.dtype).to(like.device).expand(len(like)).clone()


def _of(t: Time, rows: slice) -> Time:
    """The told time of some samples."""
    return t[rows] if isinstance(t, np.ndarray) and t.ndim else t


def _back(value: torch.Tensor) -> Array:
    """On the host; in float32 what numpy has no type for."""
    array: Array = (value.float() if value.dtype in LOW else value).cpu().numpy()
    return array
