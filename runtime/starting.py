"""Programs for requests that begin in the middle: of a picture with noise (strength), at a later step.

Where a method's numbers are made for any schedule, a program has some for each beginning (``starts.py``): the first step is
computed, and then the program's own computed steps. Where they are fitted to one schedule, a forecast is made of what the
request itself computed at the program's own steps, or not at all: where something of it lies before the beginning, the step is
computed. No number is guessed.

Shapes: as ``program.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cachec.runtime.abi import VELOCITY
from cachec.runtime.errors import InputError
from cachec.runtime.instructions import Advance, Compute, Forecast, Instruction, Predict
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

NOTHING = 1e-6  # of a row's weights; what rounding leaves of a difference


def starting_at(program: Program, step: int, told: Array | None = None) -> Program:
    """The program for a request whose latents are at the noise level of ``step``, ``program.sigmas[step]``.

    ``told`` [T]: what the sampler itself tells the model, where the program's own time steps are fitted to its rows.

    Raises:
        InputError: the program has no such step, or moves the latents from noise that such a request does not have.
    """
    first = program.key.start_step
    if step == first:
        return program
    if not first < step < program.num_steps:
        raise InputError(f"the request begins at step {step}; this program has steps {first} to {program.num_steps - 1}")
    if step in program.starts:
        return program.starts[step].begun(program, step)
    if program.one_branch_steps:
        raise InputError(
            f"the request begins at step {step}, but level {program.key.level} computes one branch of guidance at some, by "
            f"what both were before: begin at step {first}, or take another level"
        )
    if _looks_back(program):
        raise InputError(
            f"the request begins at step {step}, but this program moves the latents from the noise of step {first}, which such "
            f"a request does not have: begin at step {first}, or let a sampler outside make the steps (for_sampler)"
        )
    if program.cut == "hidden":
        return _hidden(program, step)
    return _output(program, step, program.timesteps if told is None else told)


def starting_beside(uncached: Program, program: Program, step: int) -> Program:
    """The same for a program of the bundle that ``uncached`` is of. Raises ``InputError`` if it has steps of its own, too."""
    if uncached.num_steps != program.num_steps:
        raise InputError(
            f"level {program.key.level} has {program.num_steps} steps of its own, not the bundle's {uncached.num_steps}: "
            "take another level to begin later, or let a sampler outside make the steps (for_sampler)"
        )
    return starting_at(program, step, uncached.timesteps)


def rule_of(program: Program) -> str:
    """What :func:`starting_at` does, in words."""
    if program.starts:
        return "numbers for every beginning: that step is computed, and the program's own behind it"
    if program.one_branch_steps:
        return "begins with noise only"
    if _looks_back(program):
        return "begins with noise only, or where a sampler outside does"
    return "begun later, it computes every step until what its forecasts read is there"


def _looks_back(program: Program) -> bool:
    """Are latents moved from the noise that the program begins with?"""
    if program.cut == "output":
        return program.shares is not None
    return any(isinstance(one, Advance) and one.from_noise for one in program.instructions)


@dataclass
class _Slots:
    """Feature slots: those that hold what the program means by them, and those that anything was written to."""

    capacity: int
    held: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    def write(self, slot: int | None, *, own: bool) -> int | None:
        """A computed feature goes to ``slot``; one that nothing asks for fills a slot which would be read empty."""
        if not own:
            slot = next((one for one in range(self.capacity) if one not in self.written), None)
        if slot is not None:
            self.written.add(slot)
            if own:
                self.held.add(slot)
        return slot

    def has(self, needed: set[int], bound: int) -> bool:
        """Is all there that is ``needed``, and something in each of the slots that are bound?"""
        return needed <= self.held and set(range(bound)) <= self.written


def _hidden(program: Program, start: int) -> Program:
    """On the hidden cut. Steps that move the latents by rows get rows of their own."""
    slots = _Slots(program.capacity)
    instructions: list[Instruction] = []
    moves = None if program.moves is None else program.moves.copy()
    shares = None if program.shares is None else program.shares.copy()
    advances = {one.span[0]: one for one in program.instructions if isinstance(one, Advance)}
    for one in program.instructions:
        if isinstance(one, Advance) or one.steps[-1] < start:
            continue
        kept = _as_it_is(program, one, start, slots)
        if kept is not None:
            instructions += [kept, *([advances[kept.steps[0]]] if advances else [])]
            continue
        for step in range(max(start, one.steps[0]), one.steps[-1] + 1):
            own = one.slot if isinstance(one, Predict) else None
            slot = slots.write(own, own=isinstance(one, Predict))
            computed = Compute(step, slot, graph=_graph(program, step), velocity_slot=0 if advances else None)
            instructions.append(computed)
            if moves is not None and shares is not None:
                moves[step] = 0
                shares[step], moves[step, :1] = program.step_numbers((step,))
                instructions.append(Advance((step,), 1, from_noise=False))
    key = replace(program.key, start_step=start)
    return replace(program, key=key, instructions=tuple(instructions), moves=moves, shares=shares, starts={})


def _as_it_is(program: Program, one: Instruction, start: int, slots: _Slots) -> Instruction | None:
    """An instruction that can stay, its slots taken; ``None``: its steps are to be computed instead."""
    if one.steps[0] < start:
        return None
    if isinstance(one, Compute):
        slots.write(one.slot, own=one.slot is not None)
        return one
    if isinstance(one, Forecast):
        weighed = program.coefficients[list(one.span), :, : one.num_slots].any(axis=(0, 1))
        return one if slots.has(set(map(int, np.flatnonzero(weighed))), one.num_slots) else None
    assert isinstance(one, Predict), "what else makes steps"
    if not slots.has(set(one.sources), 0):
        return None
    if one.slot is not None:
        slots.write(one.slot, own=True)
    return one


def _output(program: Program, start: int, told: Array) -> Program:
    """On the output cut: each velocity that is computed gets the next slot, and rows move the latents from where they are."""
    spans = list(_spans(program, start, told))
    num, timesteps = len(spans), program.timesteps.copy()
    groups = program.coefficients.shape[1]
    coefficients, rows_out = (np.zeros((program.num_steps, groups, num), np.float32) for _ in range(2))
    instructions: list[Instruction] = []
    for place, (computed, span, time, row, out) in enumerate(spans):
        coefficients[span[0], :, : place + 1], rows_out[list(span), :, : place + 1] = row, out
        instructions += [computed, Advance(span, place + 1, from_noise=False)]
        timesteps[span[0]] = time
    return replace(
        program,
        key=replace(program.key, start_step=start),
        instructions=tuple(instructions),
        slots={VELOCITY: num},
        timesteps=timesteps,
        coefficients=coefficients,
        rows_out=rows_out,
        starts={},
    )


def _spans(program: Program, start: int, told: Array) -> Iterator[tuple[Compute, tuple[int, ...], float, Array, Array]]:
    """Computed steps: the span of each, what the model is told, and rows [G, slots so far] for latents and for a sampler."""
    assert program.rows_out is not None, "every program of the output cut has them"
    groups, before = program.coefficients.shape[1], np.zeros_like(program.coefficients[0])
    places: dict[int, int] = {}  # of the program's own slots, among those of the new one
    place = 0
    for computed, advance in zip(program.instructions[::2], program.instructions[1::2], strict=True):
        assert isinstance(computed, Compute), "an output cut has pairs"
        assert isinstance(advance, Advance), "an output cut has pairs"
        assert computed.slot is not None, "it keeps every velocity"
        row = program.coefficients[advance.span[0]] - before
        before = program.coefficients[advance.span[0]]
        if advance.span[-1] < start:
            continue
        own, out = computed.step >= start, program.rows_out[list(advance.span)]
        if own:
            places[computed.slot] = place
        weights = np.abs(np.stack([row, *out])).max(axis=(0, 1))
        needed = np.flatnonzero(weights > NOTHING * weights.max())
        if own and set(map(int, needed)) <= places.keys():
            time = float(program.timesteps[computed.step])
            yield replace(computed, slot=place), advance.span, time, _moved(row, places, place), _moved(out, places, place)
            place += 1
            continue
        if own and told[computed.step] != program.timesteps[computed.step]:  # that velocity is of another time
            del places[computed.slot]
        for step in range(max(start, advance.span[0]), advance.span[-1] + 1):
            one = np.zeros((groups, place + 1), np.float32)
            one[:, place] = program.step_numbers((step,))[1]
            answer = np.zeros((1, groups, place + 1), np.float32)
            answer[..., place] = 1.0
            yield Compute(step, place, VELOCITY, _graph(program, step)), (step,), float(told[step]), one, answer
            place += 1


def _moved(rows: Array, places: dict[int, int], last: int) -> Array:
    """Rows [..., slots] over the slots of the new program up to ``last``."""
    moved = np.zeros((*rows.shape[:-1], last + 1), np.float32)
    for old, new in places.items():
        moved[..., new] = rows[..., old]
    return moved


def _graph(program: Program, step: int) -> str:
    """The engine of the last step up to ``step`` that the program computes."""
    return [one.graph for one in program.instructions if one.computes and one.steps[0] <= step][-1]
