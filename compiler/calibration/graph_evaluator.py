"""The evaluator of prepared graphs: PyTorch on any device, with gradients.

Shapes: as ``evaluator.py``. Noise, latents, conditions and results cross between host and device; nothing else does. With
conditions of a negative branch the model runs on ``2 B`` rows, and a feature is that of both branches, one behind the other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from cachec.compiler.calibration.evaluator import Conditions, Evaluator, Numbers, Time
from cachec.compiler.graphs.coding import Coding
from cachec.compiler.graphs.prepare import BELOW
from cachec.compiler.graphs.weights import Values
from cachec.engines.torch_device import watching_memory
from cachec.passes import Graphs
from cachec.passes.add_guidance import guidance_graph
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import (
    ADVANCE,
    BRANCHES,
    COMPUTE,
    EXPERT,
    FEATURE,
    FORECAST,
    GUIDANCE,
    HISTORY_STEPS,
    NEGATIVE,
    PAIR,
    POSITIVE,
    SIGMAS,
    STEP,
    TARGET_TIMESTEP,
    VELOCITY,
    history_name,
    history_window,
    negative_name,
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

    ``inlined``: graphs with a predictor inside the forecast graph, for Programs that call one. ``coding``: how Programs keep
    features. ``max_batch``: samples that are run at once; more are run piece by piece.
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
        coding: Coding | None = None,
    ) -> None:
        self.device, self.precision, self._max_batch = device, precision, max_batch
        self._io, self._device = io, torch.device(device)
        values = Values(self._device)
        what = f"the model's weights in {precision} on {device}"
        with watching_memory(what, "Stop what else uses it, or take a device with more memory"):
            split = values.graphs(split)
            inlined = None if inlined is None else values.graphs(inlined)
        feature = outputs(split.modules[COMPUTE])[FEATURE].meta.get("val")
        if feature is not None:
            self.feature = tuple(map(int, feature.shape[1:]))
        self._kept = None if feature is None else feature.dtype  # what graphs that were not captured give is taken as it is
        self._compute, self._behind = split.modules[COMPUTE], split.modules[FORECAST]
        self._expert = split.modules.get(EXPERT)
        self._coding = None if coding is None else coding.on(self._device)
        self._predictor = None if inlined is None else inlined.modules[FORECAST]
        if inlined is not None and FEATURE not in outputs(
            inlined.modules[FORECAST]
        ):  # slots hold tokens, no feature of the cut
            self._compute = inlined.modules[COMPUTE]
        ndim = outputs(split.modules[COMPUTE])[VELOCITY].meta["val"].ndim if io.guidance is not None else 0
        self._guide = None if io.guidance is None else guidance_graph(io.guidance, ndim)

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

    def _evaluate(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Tensors, graph: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``graph``: which one answers, by default the one that is for these times."""
        velocity, feature = self._answer(x, t, conditions, graph)
        scale = conditions.get(GUIDANCE)
        return self._combined(velocity, scale), _side_by_side(feature, scale)

    def _answer(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Tensors, graph: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity and feature of all branches that there are, [2 B, …] of two."""
        given, _ = self._rows({self._io.latents: x, self._io.timestep: t}, conditions)
        expert = self._expert if (self._graph_at(t) if graph is None else graph) == EXPERT else None
        result = (expert or self._compute)(**given)
        return result[VELOCITY], result[FEATURE]

    def _graph_at(self, t: torch.Tensor) -> str:
        """Which compute graph answers at these told times [B]: all by one."""
        if self._expert is None:
            return COMPUTE
        late = t < self._expert.meta[BELOW]
        if late.any() != late.all():
            raise InputError("samples at times of both transformers are asked for at once: evaluate them apart")
        return EXPERT if late.all() else COMPUTE

    def _tail(self, feature: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> torch.Tensor:
        feature = feature if self._kept is None else feature.to(self._kept)
        given, scale = self._rows({self._io.timestep: t}, conditions)
        given[FEATURE] = feature if scale is None else torch.cat(feature.chunk(2, 1))
        return self._combined(_call(self._behind, given)[VELOCITY], scale)

    def _rows(self, given: Tensors, conditions: Tensors) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What the model takes, and the scale of guidance: with one, the rows of the negative branch, then the positive's."""
        scale = conditions.get(GUIDANCE)
        if scale is None:
            return {**given, **conditions}, None
        given = {**given, **{name: conditions[name] for name in (TARGET_TIMESTEP,) if name in conditions}}
        both = {name: torch.cat([conditions[negative_name(name)], conditions[name]]) for name in self._io.conditions}
        return {**{name: torch.cat([value, value]) for name, value in given.items()}, **both}, scale

    def _combined(self, velocity: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """One velocity of the branches' [2 B, …]."""
        if scale is None:
            return velocity
        assert self._guide is not None, "a scale is given for a rule"
        negative, positive = velocity.chunk(2)
        combined: torch.Tensor = self._guide(**{NEGATIVE: negative, POSITIVE: positive, GUIDANCE: scale})[VELOCITY]
        return combined

    def _encode(self, feature: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """A feature as Programs keep it: in the code, if there is one, whose rows are those of the model."""
        if self._coding is None:
            return feature
        code: torch.Tensor = self._coding.encode(feature if scale is None else torch.cat(feature.chunk(2, 1)))
        return code

    def _decode(self, kept: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return kept if self._coding is None else _side_by_side(self._coding.decode(kept), scale)

    def _predict(
        self, history: Tensors, x: torch.Tensor, t: torch.Tensor, conditions: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._predictor is None:
            raise InputError("the program calls a predictor inside its engine, and this evaluator was given none")
        given, scale = self._rows({self._io.latents: x, self._io.timestep: t}, conditions)
        features = {history_name(i) for i in range(history_window(history))} if scale is not None else set()
        past = {name: torch.cat(one.chunk(2, 1)) if name in features else one for name, one in history.items()}
        result = _call(self._predictor, {**given, **past})
        feature = result.get(FEATURE)
        return self._combined(result[VELOCITY], scale), None if feature is None else _side_by_side(feature, scale)


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
        self._program, self._coefficients = program, coefficients
        self._sigmas, self._timesteps = program.sigmas, timesteps
        self._slots: dict[tuple[str, int], torch.Tensor] = {}
        self._kept: dict[tuple[str, int], int] = {}  # which step each slot is of

    def play(self, instruction: Instruction) -> None:
        """Carry out one instruction, by what it says of itself."""
        if instruction.computes:
            (step,) = instruction.steps
            self._compute(instruction, step, both=PAIR not in instruction.reads)
        elif not instruction.rows:
            (step,) = instruction.steps
            history = self._history(step, instruction.reads[FEATURE])
            self._keep(instruction, *self._evaluator._predict(history, self.latents, self._told(step), self._given(step)))
        elif instruction.graph == ADVANCE:
            self._advance(instruction)
        else:
            for step in instruction.rows:
                kept = self._weighted(instruction, step, FEATURE)
                feature = self._evaluator._decode(kept, self._conditions.get(GUIDANCE))
                velocity = self._evaluator._tail(feature, self._told(step), self._given(step))
                self._keep_velocity(instruction, step, velocity)

    def _compute(self, instruction: Instruction, step: int, *, both: bool) -> None:
        """Run the model: on ``both`` branches, or all that there are; or on the positive one, and forecast the other."""
        evaluator, scale = self._evaluator, self._conditions.get(GUIDANCE)
        given, own = self._given(step), (*evaluator._io.conditions, TARGET_TIMESTEP)
        known = given if both else {name: value for name, value in given.items() if name in own}
        velocity, feature = evaluator._answer(self.latents, self._told(step), known, instruction.graph)
        for slot in instruction.writes.get(PAIR, ()):
            self._slots[PAIR, slot] = velocity
        if not both:
            pairs = torch.cat([torch.stack(self._slots[PAIR, slot].chunk(2)) for slot in instruction.reads[PAIR]])
            row, share = (torch.from_numpy(one).to(velocity) for one in self._program.pair_weights(step, len(pairs) // 2))
            velocity = torch.cat([share * velocity + torch.tensordot(row[0], pairs, 1), velocity])
        self._keep(instruction, evaluator._combined(velocity, scale), _side_by_side(feature, scale if both else None))

    def _keep(self, instruction: Instruction, velocity: torch.Tensor, feature: torch.Tensor | None) -> None:
        (step,) = instruction.steps
        for slot in instruction.writes.get(FEATURE, ()):
            assert feature is not None, "what writes one gives one"
            kept = self._evaluator._encode(feature, self._conditions.get(GUIDANCE))
            self._slots[FEATURE, slot], self._kept[FEATURE, slot] = kept, step
        self._keep_velocity(instruction, step, velocity)

    def _keep_velocity(self, instruction: Instruction, step: int, velocity: torch.Tensor) -> None:
        """In the slot that is for it; without one it moves the latents."""
        if slots := instruction.writes.get(VELOCITY):
            self._slots[VELOCITY, slots[instruction.steps.index(step)]] = velocity
        else:
            self._move(step, velocity)

    def _advance(self, instruction: Instruction) -> None:
        first, shares = instruction.rows[0], self._program.shares
        base = self._noise if instruction.from_noise else self.latents
        share = 1.0 if shares is None else float(shares[first])
        self.latents = share * base + self._weighted(instruction, first, VELOCITY)

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
        weights = self._program.weights_of(instruction)
        rows = self._coefficients if weights is self._program.coefficients or weights is None else weights
        values = torch.stack([self._slots[kind, slot] for slot in instruction.reads[kind]]).to(self._noise.dtype)
        groups = torch.from_numpy(rows[step, :, : len(values)]).to(self._noise)
        if len(groups) == 1:
            total: torch.Tensor = torch.tensordot(groups[0], values, 1)
            return total if kind == VELOCITY else total + float(self._program.bias[step])
        sizes, axis = self._parts(values)
        biases = np.broadcast_to(self._program.bias[step], len(groups)).tolist()
        each = zip(groups, torch.split(values, list(sizes), axis + 1), biases, strict=True)
        return torch.cat([torch.tensordot(row, part, 1) + bias for row, part, bias in each], axis)

    def _parts(self, values: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """The groups of what slots hold [H, …]: sizes along an axis of one; without a coding the branches, side by side."""
        if (coding := self._evaluator._coding) is not None:
            return coding.groups.sizes, coding.groups.axis
        half = values.shape[2] // len(BRANCHES)
        return (half,) * len(BRANCHES), 1

    def _move(self, step: int, velocity: torch.Tensor) -> None:
        kept, worth = self._program.step_numbers([step])
        start = self.latents if kept == 1 else kept * self.latents
        self.latents = start + float(worth[0]) * velocity

    def _told(self, step: int) -> torch.Tensor:
        return _told(self._timesteps[step], self._noise)

    def _given(self, step: int) -> Tensors:
        """The conditions, and the second time that flow maps are told."""
        targets = self._program.target_timesteps
        if targets is None:
            return self._conditions
        return {**self._conditions, TARGET_TIMESTEP: _told(targets[step], self._noise)}


def _side_by_side(feature: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A feature [B, 2 L, D] of both branches' [2 B, L, D]; without guidance as it is."""
    return feature if scale is None else torch.cat(feature.chunk(2), 1)


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
