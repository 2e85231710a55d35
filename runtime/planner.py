"""From a program to a plan: which buffers a session needs, and which part of which one every engine call reads and writes.

What an instruction offers is put to what its engine takes, by name: no instruction and no engine is treated on its own.
Nothing here touches a device. ``B`` batch, ``S`` slots, ``T`` steps, ``H`` written slots, ``n`` forecasts of one instruction.
A guided request runs the model on ``2 B`` rows: those of the negative branch, then those of the positive one.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cachec.runtime.abi import (
    ADVANCE,
    BASE,
    BASE_SHARE,
    BATCH,
    BIAS,
    CARRY,
    COEFFICIENTS,
    DELTA,
    DELTAS,
    FEATURE,
    FEATURES,
    FORECASTS,
    GUIDANCE,
    GUIDE,
    HISTORY_STEPS,
    NEGATIVE,
    NEXT_LATENTS,
    PAIR,
    POSITIVE,
    PROLOGUE,
    SIGMAS,
    STEP,
    TARGET_TIMESTEP,
    VELOCITIES,
    VELOCITY,
    history_name,
    hoisted_name,
    negative_name,
    steps_of,
    timesteps_of,
)
from cachec.runtime.errors import BundleError, in_one_line
from cachec.runtime.instructions import Instruction
from cachec.runtime.model_io import ModelIO
from cachec.runtime.plan import (
    NOISE_BUFFER,
    TURNS,
    VELOCITY_BUFFER,
    BindingPlan,
    PlannedAside,
    PlannedBuffer,
    PlannedCall,
    Slot,
    View,
    as_taken,
    condition_name,
    is_run,
    no_velocities,
    slots_name,
)
from cachec.runtime.plan_buffers import PlannedBuffers
from cachec.runtime.program import Program
from cachec.runtime.specs import Array, Signature, TensorSpec

SIDE_BY_SIDE = {
    FEATURE: FEATURES,
    VELOCITY: VELOCITIES,
    PAIR: VELOCITIES,
}  # the input that takes several slots of a kind at once
DTYPE_NAMES = {np.dtype(name): name for name in ("float32", "int64")}  # of constants; numpy takes long to say them


def plan_binding(
    signatures: Mapping[str, Signature], program: Program, io: ModelIO, *, batch: int, for_sampler: bool = False,
    tables: Mapping[str, PlannedBuffer] | None = None,
) -> BindingPlan:  # fmt: skip
    """The plan of a session. ``for_sampler``: every step leaves a velocity, and the latents come from outside.

    ``tables``: inputs that are the same in all calls.

    Raises:
        BundleError: the program needs an engine, or an engine an input, that there is not.
        InputError: velocities are wanted, and the engines hand out none; or of a program that computes one branch alone.
    """
    if for_sampler:
        program.of_branch(None).check_both_branches()
    return _Planner(signatures, program, io, batch, for_sampler, tables or {}).plan()


class _Planner:
    """Buffers and calls found so far."""

    def __init__(
        self, signatures: Mapping[str, Signature], program: Program, io: ModelIO, batch: int, for_sampler: bool,
        tables: Mapping[str, PlannedBuffer],
    ) -> None:  # fmt: skip
        self._signatures, self._program, self._io, self._for_sampler = signatures, program, io, for_sampler
        self._batch, self._guided = batch, program.key.guided and not for_sampler
        self._space = PlannedBuffers(batch, guided=self._guided)
        self._tables = {name: self._space.take(buffer) for name, buffer in tables.items()}
        needed = {*(one.graph for one in program.instructions), *([GUIDE] if self._guided else [])}
        if missing := ", ".join(sorted(needed - set(signatures))):
            raise BundleError(f"the program needs the engine {in_one_line(missing)}, which the bundle lacks: compile it again")
        self._steps = {
            graph: tuple(step for one in program.instructions if one.graph == graph for step in one.steps)
            for graph in signatures
        }
        self._hoisted = {spec.name: spec for spec in signatures[PROLOGUE].outputs} if PROLOGUE in signatures else {}
        self._by_step = {COEFFICIENTS: program.coefficients, BIAS: program.bias, io.timestep: program.timesteps}
        if (second := program.target_timesteps) is not None:
            self._by_step[TARGET_TIMESTEP] = second
        self._holds: dict[tuple[str, int], int] = {}  # the step that a slot, by kind and number, is of
        self._moves = 0

    def plan(self) -> BindingPlan:
        instructions = self._program.instructions
        model = self._signatures[next(one.graph for one in instructions if one.computes)]
        latents = model.input(self._io.latents)
        for kind, count in self._program.slots.items():
            writer = next(one.graph for one in instructions if kind in one.writes)
            combined = self._guided and kind == VELOCITY
            kept = self._signatures[GUIDE if combined else writer].output(VELOCITY if kind == PAIR else kind)
            self._space.add(slots_name(kind), (count, *self._space.resolve(kept, GUIDE if combined else writer)), kept.dtype)
        for name in (NOISE_BUFFER, *TURNS):
            self._space.add_like(name, latents)
        self._space.add_like(VELOCITY_BUFFER, model.output(VELOCITY))
        given = self._plan_given()
        prologue = self._plan_prologue()
        by_instruction = tuple(tuple(self._plan_calls(instruction)) for instruction in instructions)
        return BindingPlan(
            self._space.found,
            prologue,
            by_instruction,
            self._space.branch(self._latents()),
            latents,
            given,
            self._space.branches(NOISE_BUFFER),
            self._plan_asides() if self._for_sampler else {},
        )

    def _plan_given(self) -> dict[str, tuple[TensorSpec, View]]:
        """What a request brings besides noise: the conditions that any engine reads, for each branch, and the scale."""
        specs = {spec.name: spec for signature in self._signatures.values() for spec in signature.inputs}
        read = [name for name in self._io.conditions if name in specs]
        self._conditions = {name: self._space.add_like(condition_name(name), specs[name]) for name in read}
        given = {name: (specs[name], self._space.branch(self._conditions[name])) for name in read}
        if self._guided:
            for name in read:
                negative, spec = negative_name(name), specs[name]
                given[negative] = (TensorSpec(negative, spec.shape, spec.dtype), self._space.branches(condition_name(name))[0])
            scale = self._signatures[GUIDE].input(GUIDANCE)
            self._scale = self._space.add(condition_name(GUIDANCE), (self._batch,), scale.dtype)
            given[GUIDANCE] = (scale, self._scale)
        return given

    def _latents(self) -> View:
        """Where the latents are after the moves so far."""
        return View(TURNS[(self._moves - 1) % 2] if self._moves else NOISE_BUFFER)

    def _plan_prologue(self) -> PlannedCall | None:
        """Everything that does not depend on latents, for all steps of the program."""
        if PROLOGUE not in self._signatures:
            return None
        steps = {graph: some or (0,) for graph, some in self._steps.items()}  # no size may be zero
        times = {timesteps_of(graph): self._program.timesteps[list(some)] for graph, some in steps.items()}
        second = self._program.target_timesteps
        times |= {} if second is None else {timesteps_of(g, second=True): second[list(some)] for g, some in steps.items()}
        sizes = {steps_of(graph): len(some) for graph, some in steps.items()}
        outputs = {name: self._space.add_like(f"hoisted/{name}", spec, **sizes) for name, spec in self._hoisted.items()}
        return self._call(PROLOGUE, (), self._conditions, times, outputs)

    def _plan_asides(self) -> dict[str, PlannedAside]:
        """Each compute graph once more, for times that the program does not tell; not where it is told two of them."""
        graphs = dict.fromkeys(one.graph for one in self._program.instructions if one.computes)
        return {} if self._program.target_timesteps is not None else {graph: self._plan_aside(graph) for graph in graphs}

    def _plan_aside(self, graph: str) -> PlannedAside:
        """Its calls. What its prologue makes for the request only is there already."""
        told, calls, place = list[str](), list[PlannedCall](), f"aside/{graph}"
        inputs: dict[str, View] = {self._io.latents: View(NOISE_BUFFER), **self._conditions}
        by_step = dict[str, View]()
        for spec in self._signatures[graph].inputs:
            if (name := hoisted_name(graph, spec.name)) in self._hoisted:
                made = self._hoisted[name]
                if made.shape[0] == steps_of(graph):
                    by_step[name] = self._space.add_like(f"{place}/{name}", made, **{steps_of(graph): 1})
                inputs[spec.name] = View(by_step[name].buffer, 0) if name in by_step else View(f"hoisted/{name}")
            elif spec.name == self._io.timestep:
                inputs[spec.name] = self._space.add_like(f"{place}/{spec.name}", spec)
                told.append(f"{place}/{spec.name}")
            elif spec.name in (DELTA, CARRY):  # what moves the latents, which stay
                zeros = np.zeros(self._space.resolve(spec, graph), spec.dtype)
                inputs[spec.name] = self._space.add(f"{place}/{spec.name}", zeros.shape, spec.dtype, zeros)
        if by_step:
            time = self._space.add(f"{place}/told", (1,), "float32")
            told.append(time.buffer)
            others = self._conditions.keys() | self._tables.keys()
            times = {spec.name: time for spec in self._signatures[PROLOGUE].inputs if spec.name not in others}
            calls.append(self._call(PROLOGUE, (), {**self._conditions, **times}, {}, by_step))
        velocity = View(VELOCITY_BUFFER)
        calls.append(self._call(graph, (), inputs, {}, {VELOCITY: velocity}))
        return PlannedAside(tuple(told), tuple(calls), velocity)

    def _plan_calls(self, instruction: Instruction) -> list[PlannedCall]:
        """The calls of an instruction; with a sampler outside, one for each step that weighted velocities move over."""
        if instruction.graph == ADVANCE:
            if not self._for_sampler:
                return self._plan_advance(instruction)
            steps = instruction.steps if self._program.rows_out is not None else ()
            return [self._plan_step_out(instruction, step) for step in steps]
        if PAIR in instruction.reads:
            return self._plan_positive(instruction)
        latents = self._latents()
        results = self._results(instruction)
        velocities = self._velocities(instruction, results) if self._for_sampler else ()
        pairs = self._pairs(instruction, results) if self._guided else None
        inputs, values = self._inputs(instruction, latents), self._values(instruction, self._space.rows)
        reads = tuple(self._counting(instruction, self._program.coefficients, step) for step in instruction.steps)
        keeps = {
            (kind, slot): step
            for kind, slots in instruction.writes.items()
            for slot, step in zip(slots, instruction.steps, strict=True)
        }
        self._holds.update(keeps)
        call = self._call(instruction.graph, instruction.steps, inputs, values, results, latents, velocities)
        if pairs is not None:
            return [call, *self._plan_guides(instruction, pairs, latents)]
        computed = results.get(VELOCITY) if instruction.computes else None
        return [replace(call, reads=reads, keeps=keeps, computed=computed)]

    def _counting(self, instruction: Instruction, rows: Array, step: int) -> dict[Slot, int]:
        """The slots that count for a step of an instruction, by ``rows`` if it weighs them, and the steps that they hold."""
        read = [(kind, slot) for kind, slots in instruction.reads.items() for slot in slots]
        weighs = [rows[step, :, place].any() for place in range(len(read))] if instruction.rows else [True] * len(read)
        return {slot: self._holds[slot] for slot, counts in zip(read, weighs, strict=True) if counts}

    def _plan_advance(self, instruction: Instruction) -> list[PlannedCall]:
        """The move of an ``Advance``; guided, one for each branch's copy of the latents."""
        before = self._latents()
        base = View(NOISE_BUFFER) if instruction.from_noise else before
        inputs = {**self._inputs(instruction, before), BASE: self._space.branch(base)}
        values = self._values(instruction, self._space.rows)
        self._moves += 1
        return [
            self._call(ADVANCE, instruction.steps, inputs, values, {NEXT_LATENTS: after}, before, place=f"{ADVANCE}/{branch}")
            for branch, after in enumerate(self._space.branches(self._latents().buffer))
        ]

    def _pairs(self, instruction: Instruction, results: dict[str, View]) -> list[tuple[View, View]]:
        """Where an instruction leaves the velocities of both branches, step by step, instead of in slots."""
        size, steps = self._batch, len(instruction.steps)
        if VELOCITIES in results:
            spec = self._signatures[instruction.graph].output(VELOCITIES)
            name = f"pairs/{instruction.steps[0]}"
            results[VELOCITIES] = self._space.add_like(name, spec, **{FORECASTS: steps})
            rows, starts = self._space.one_by_one(name), [2 * size * step for step in range(steps)]
        elif PAIR in results:
            slot = results[VELOCITY] = results.pop(PAIR)
            rows, starts = self._space.one_by_one(slot.buffer), [2 * size * (slot.start or 0)]
        else:
            results[VELOCITY] = View(VELOCITY_BUFFER)
            rows, starts = VELOCITY_BUFFER, [0]
        return [(View(rows, at, at + size), View(rows, at + size, at + 2 * size)) for at in starts]

    def _plan_positive(self, instruction: Instruction) -> list[PlannedCall]:
        """The model on the positive branch's rows, the negative one's velocity by rows over pairs, and both combined."""
        latents, (step,), num = self._latents(), instruction.steps, len(instruction.reads[PAIR])
        negative, positive = self._space.branches(VELOCITY_BUFFER)
        inputs, row, share = self._inputs(instruction, latents), *self._program.pair_weights(step, num)
        for spec in self._signatures[instruction.graph].inputs:
            if spec.name in inputs and spec.shape[:1] == (BATCH,):
                inputs[spec.name] = self._space.positive(inputs[spec.name])
        values = self._values(instruction, self._batch)
        model = self._call(instruction.graph, (step,), inputs, values, {VELOCITY: positive}, latents)
        given = {BASE: positive, VELOCITIES: View(self._space.by_batch(slots_name(PAIR)), 0, 2 * num)}
        weights, made, place = {COEFFICIENTS: row, BASE_SHARE: share}, {NEXT_LATENTS: negative}, f"{ADVANCE}/{NEGATIVE}"
        forecast = self._call(ADVANCE, (step,), given, weights, made, latents, place=place)
        self._holds.update({(VELOCITY, slot): step for slot in instruction.writes[VELOCITY]})
        return [model, forecast, *self._plan_guides(instruction, [(negative, positive)], latents)]

    def _plan_guides(self, instruction: Instruction, pairs: list[tuple[View, View]], latents: View) -> list[PlannedCall]:
        """A call for each step that combines both branches' velocities into the slot that is for it."""
        calls = []
        for step, slot, (negative, positive) in zip(instruction.steps, instruction.writes[VELOCITY], pairs, strict=True):
            inputs = {NEGATIVE: negative, POSITIVE: positive, GUIDANCE: self._scale}
            results = {VELOCITY: View(slots_name(VELOCITY), slot)}
            calls.append(self._call(GUIDE, (step,), inputs, {}, results, latents))
        return calls

    def _inputs(self, instruction: Instruction, latents: View) -> dict[str, View]:
        """What its engine may read."""
        inputs = {self._io.latents: latents, **self._conditions}
        for kind, slots in instruction.reads.items():
            inputs |= {history_name(i): View(slots_name(kind), slot) for i, slot in enumerate(slots)}
            inputs[SIDE_BY_SIDE[kind]] = View(slots_name(kind), 0, len(slots))  # slots behind it may hold anything
        first, count = self._steps[instruction.graph].index(instruction.steps[0]), len(instruction.steps)
        for spec in self._signatures[instruction.graph].inputs:
            name = hoisted_name(instruction.graph, spec.name)
            if name in self._hoisted:
                rows = (first, first + count) if is_run(spec) else (first, None)
                by_step = self._hoisted[name].shape[0] == steps_of(instruction.graph)
                inputs[spec.name] = View(f"hoisted/{name}", *rows) if by_step else View(f"hoisted/{name}")
        return inputs

    def _values(self, instruction: Instruction, samples: int) -> dict[str, Array]:
        """The numbers that its engine may read: rows of all its steps for a run of them, else the row of its first."""
        history = [self._holds[kind, slot] for kind, slots in instruction.reads.items() for slot in slots]
        (kept, worth), shares = self._program.step_numbers(instruction.steps), self._program.shares
        values = {
            SIGMAS: self._program.sigmas,
            STEP: np.array(instruction.steps[0], np.int64),
            HISTORY_STEPS: np.array(history, np.int64),
            BASE_SHARE: np.ones(1, np.float32) if shares is None else shares[instruction.steps[0], None],
            DELTA: np.broadcast_to(worth[0], (samples,)),
            DELTAS: worth,
        }
        for spec in self._signatures[instruction.graph].inputs:
            if spec.name == CARRY:
                values[CARRY] = np.broadcast_to(np.float32(kept), (samples if spec.shape[-1:] == (BATCH,) else 1,))
            if spec.name in self._by_step:
                weights = self._program.weights_of(instruction) if spec.name == COEFFICIENTS else None
                series = self._by_step[spec.name] if weights is None else weights
                rows = series[list(instruction.steps)] if is_run(spec) else series[instruction.steps[0]]
                rows = rows[..., : len(history)] if spec.name == COEFFICIENTS else rows
                values[spec.name] = as_taken(rows, spec, samples, has_branches=self._program.has_branches)
        return values

    def _results(self, instruction: Instruction) -> dict[str, View]:
        """What its engine leaves: what is kept, a velocity that nobody may want, and the latents that it moves."""
        results, given = dict[str, View](), {spec.name for spec in self._signatures[instruction.graph].outputs}
        for kind, slots in instruction.writes.items():
            many = VELOCITIES in given and kind == VELOCITY
            results[VELOCITIES if many else kind] = View(slots_name(kind), slots[0], slots[0] + len(slots) if many else None)
        if VELOCITY in given:
            results.setdefault(VELOCITY, View(VELOCITY_BUFFER))
        elif VELOCITY in results:
            raise no_velocities("latents that are moved by rows need")
        if self._for_sampler:
            return results
        if instruction.moves:
            if self._program.carry is not None and CARRY not in {s.name for s in self._signatures[instruction.graph].inputs}:
                raise BundleError(f"the engine {instruction.graph} takes the steps of flows only, which the program's are not")
            self._moves += 1
            results[NEXT_LATENTS] = self._latents()
        return results

    def _velocities(self, instruction: Instruction, results: dict[str, View]) -> tuple[View, ...]:
        """What a sampler outside gets of each step; ``results`` take in what has to be asked for."""
        if self._program.rows_out is not None:
            return ()  # it gets what the move behind it makes of the slots
        if VELOCITY in results:
            return (results[VELOCITY],)
        signature, steps = self._signatures[instruction.graph], instruction.steps
        if VELOCITIES not in {spec.name for spec in signature.outputs}:
            raise no_velocities("a sampler outside needs")
        name = f"velocities/{steps[0]}"
        results[VELOCITIES] = self._space.add_like(name, signature.output(VELOCITIES), **{FORECASTS: len(steps)})
        return tuple(View(name, row) for row in range(len(steps)))

    def _plan_step_out(self, instruction: Instruction, step: int) -> PlannedCall:
        """One step of a move, for a sampler outside: its row over the slots, and its share of the latents that came in."""
        assert self._program.rows_out is not None  # as the caller has looked
        assert self._program.share_out is not None  # as the program has checked
        bound = sum(map(len, instruction.reads.values()))
        values = {COEFFICIENTS: self._program.rows_out[step, :, :bound], BASE_SHARE: self._program.share_out[step : step + 1]}
        latents, result = View(NOISE_BUFFER), View(TURNS[0])
        inputs = {**self._inputs(instruction, latents), BASE: latents}
        call = self._call(instruction.graph, (step,), inputs, values, {NEXT_LATENTS: result}, latents, (result,))
        return replace(call, reads=(self._counting(instruction, self._program.rows_out, step),))

    def _call(
        self,
        engine: str,
        steps: tuple[int, ...],
        inputs: Mapping[str, View],
        constants: Mapping[str, Array],
        results: Mapping[str, View],
        latents: View | None = None,
        velocities: tuple[View, ...] = (),
        place: str = "",
    ) -> PlannedCall:
        """A call with those of the inputs that the engine has; each constant gets a buffer of its own."""
        known = {**self._tables, **inputs}
        wanted = [spec.name for spec in self._signatures[engine].inputs]
        for name in wanted:
            if name in constants:
                value = constants[name]
                label = "/".join([place or engine, *map(str, steps[:1]), name])
                known[name] = self._space.add(label, value.shape, DTYPE_NAMES[value.dtype], value)
        if missing := [name for name in wanted if name not in known]:
            named = in_one_line(", ".join(missing))
            raise BundleError(f"the engine {engine} takes what its program lacks, {named}: compile again")
        start = None if latents is None else self._space.branch(latents)
        return PlannedCall(engine, steps, {name: known[name] for name in wanted}, results, start, velocities)
