"""Lowering: from a schedule and coefficients to a program with slots."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import FEATURE, PAIR, VELOCITY
from cachec.runtime.errors import InputError
from cachec.runtime.instructions import Advance, Compute, ComputePositive, Forecast, Instruction, Predict
from cachec.runtime.program import Program, ProgramKey, composed
from cachec.runtime.specs import Array
from cachec.runtime.starts import Start

NO_TAIL = (
    "on the hidden cut forecasts are made by the tail of one transformer, and the model has two: "
    "take a method of the output cut (gram, bns, adams)"
)


NOTHING = 1e-9  # a weight of rounding: what it weighs need not be there


def lower(table: ForecastTable | AdvanceTable, key: ProgramKey, sampling: Sampling) -> Program:
    """A program of the cut that the table is of, which begins where its schedule does.

    Raises:
        InputError: steps compute one branch of guidance, of a request without, or on the hidden cut.
    """
    table.schedule.check_conditional("hidden" if isinstance(table, ForecastTable) else "output", guided=key.guided)
    key = replace(key, start_step=table.schedule.start)
    if isinstance(table, ForecastTable):
        return lower_table(table, key, sampling)
    return lower_advance(table, key, sampling)


def lower_table(table: ForecastTable, key: ProgramKey, sampling: Sampling) -> Program:
    """A program for the linear forecast engine.

    Slots go to computed features by liveness: from the step that writes one to the last step that reads it.
    """
    schedule = table.schedule
    row_of = {step: i for i, step in enumerate(schedule.compute)}
    weighed = np.any(table.coefficients, axis=1)
    last_read = {step: int(max(np.flatnonzero(weighed[:, i]), default=-1)) for step, i in row_of.items()}
    for step in schedule.forecast:  # a row without any weight (a pure bias) still binds its newest feature
        newest = max(s for s in schedule.compute if s < step)
        last_read[newest] = max(last_read[newest], step)
    slots = _Slots()
    coefficients = np.zeros((*table.coefficients.shape[:2], max(len(row_of), 1)))
    instructions: list[Instruction] = []
    run: list[int] = []  # forecast steps since the last computed one
    for step in range(schedule.start, schedule.num_steps):
        slots.release(last_read, step)
        if run and step in row_of:
            instructions.append(Forecast(tuple(run), slots.capacity))
            run = []
        if step in row_of:
            slot = slots.assign(step) if last_read[step] >= 0 else None
            instructions.append(Compute(step, slot))
            continue
        for owner, slot in slots.live.items():
            coefficients[step, :, slot] = table.coefficients[step, :, row_of[owner]]
        run.append(step)
    if run:
        instructions.append(Forecast(tuple(run), slots.capacity))
    return _hidden(key, instructions, slots.capacity, sampling, coefficients[..., : slots.capacity], table.bias)


def lower_predictor(schedule: Schedule, window: int, *, feeds_back: bool, key: ProgramKey, sampling: Sampling) -> Program:
    """A program for a forecast engine with the predictor inside: slots hold every feature that a later step looks at."""
    histories = {step: schedule.history(step, window, feeds_back=feeds_back) for step in schedule.forecast}
    last_read: dict[int, int] = {}
    for step, history in histories.items():
        last_read.update(dict.fromkeys(history, step))
    slots = _Slots()
    instructions: list[Instruction] = []
    for step in range(schedule.start, schedule.num_steps):
        if step not in histories:
            slots.release(last_read, step)
            instructions.append(Compute(step, slots.assign(step) if step in last_read else None))
            continue
        sources = tuple(slots.live[source] for source in histories[step])
        slots.release(last_read, step)  # not those read now: the result must not overwrite them
        slot = slots.assign(step) if step in last_read else None
        instructions.append(Predict(step, sources, slot))
    coefficients = np.zeros((schedule.num_steps, 1, slots.capacity))
    key = replace(key, start_step=schedule.start)
    return _hidden(key, instructions, slots.capacity, sampling, coefficients, np.zeros(schedule.num_steps))


def with_starts(make: Callable[[Schedule], Program], schedule: Schedule, sampling: Sampling) -> Program:
    """What ``make`` gives for the schedule, and its numbers for runs that begin at a later step, which it is asked for again.

    A sampler that looks back takes other steps where it begins anew, of which nothing is known here: then there are none.
    """
    whole = make(schedule)
    if sampling.euler is None or not schedule.forecast:
        return whole
    starts = {step: Start.of(make(schedule.after(step)), whole) for step in range(1, schedule.num_steps)}
    return replace(whole, starts=starts)


def lower_uncached(key: ProgramKey, sampling: Sampling) -> Program:
    """The same sampling with every step computed: what a cached run is compared with."""
    instructions: list[Instruction] = [Compute(step) for step in range(key.start_step, key.steps)]
    return _hidden(key, instructions, 0, sampling, np.zeros((key.steps, 1, 0)), np.zeros(key.steps))


def lower_advance(table: AdvanceTable, key: ProgramKey, sampling: Sampling) -> Program:
    """A program for the output cut: it needs no forecast engine. Every velocity keeps its own slot to the end.

    A sampler outside gets one and the same answer at all steps of a gap, which brings it to where the program moves. A step
    that computes the positive branch alone takes the two branches to be as far apart as they were when both were computed last.

    Raises:
        InputError: there is no such answer, as the sampler lets a gap's outputs cancel.
    """
    schedule, num = table.schedule, len(table.schedule.compute)
    rows, ends = np.tril(table.coefficients), [*schedule.compute[1:], schedule.num_steps]
    coefficients = np.zeros((schedule.num_steps, num))
    coefficients[list(schedule.compute)] = rows * sampling.shares[ends, None]
    timesteps = sampling.timesteps.copy()
    if table.timesteps is not None:
        timesteps[list(schedule.compute)] = table.timesteps
    instructions: list[Instruction] = []
    for slot, (step, end, following) in enumerate(zip(schedule.compute, ends, [*schedule.compute[1:], None], strict=True)):
        kept = 0 if following in schedule.conditional and step not in schedule.conditional else None
        one = ComputePositive(step, slot, 1) if step in schedule.conditional else Compute(step, slot, VELOCITY, pair_slot=kept)
        instructions += [one, Advance(tuple(range(step, end)), slot + 1)]
    slots, numbers = {VELOCITY: num}, {"rows_out": _answers(rows, schedule, sampling), "share_out": np.zeros(key.steps)}
    if sampling.rows is not None:
        numbers["shares"] = np.ones(key.steps)
        numbers["shares"][list(schedule.compute)] = sampling.shares[ends] / sampling.shares[schedule.start]
    if schedule.conditional:
        slots[PAIR] = 1
        numbers["pair_rows"], numbers["pair_shares"] = np.zeros((key.steps, 2, 1)), np.zeros(key.steps)
        numbers["pair_rows"][list(schedule.conditional)] = [[1.0], [-1.0]]
        numbers["pair_shares"][list(schedule.conditional)] = 1.0
    told = replace(sampling, timesteps=timesteps)
    return _program(key, instructions, slots, told, coefficients[:, None], np.zeros(key.steps), **numbers)


def _answers(rows: Array, schedule: Schedule, sampling: Sampling) -> Array:
    """What a sampler outside is answered, over the velocities [T, K], so that it goes where ``rows`` [K, K] lead."""
    answers, moves = np.zeros((schedule.num_steps, len(rows))), sampling.moves
    for slot, (begin, end) in enumerate(pairwise([*schedule.compute, schedule.num_steps])):
        weights = moves[end, begin:end]
        missing = rows[slot] - moves[end, :begin] @ answers[:begin]
        if abs(weights.sum()) <= 1e-6 * np.abs(moves[end]).sum():
            if np.abs(missing).sum() <= 1e-6 * np.abs(rows[slot]).sum():  # it does not listen, and need not
                answers[begin:end, slot] = 1.0
                continue
            raise InputError(
                f"steps {begin} to {end - 1} of {sampling.name} cancel each other, so that no answer brings it past them: "
                "compile for the hidden cut, or take another sampler"
            )
        answers[begin:end] = missing / weights.sum()
    answers[np.abs(answers) < NOTHING] = 0.0
    return answers


def _hidden(
    key: ProgramKey, instructions: list[Instruction], capacity: int, sampling: Sampling, coefficients: Array, bias: Array
) -> Program:
    """A program of the hidden cut whose instructions move the latents themselves, if the sampler and the request allow it.

    A guided request needs both branches' velocities first, and a sampler that looks back needs those of earlier steps: then
    velocities go to slots, and rows over them move the latents.
    """
    slots = {FEATURE: capacity} if capacity else {}
    numbers: dict[str, Array] = {}
    if sampling.rows is not None and sampling.euler is not None:
        numbers = {name: value.astype(np.float32) for name, value in zip(("carry", "gain"), sampling.euler, strict=True)}
    if sampling.euler is not None and not key.guided:
        return _program(key, instructions, slots, sampling, coefficients, bias, **numbers)
    looks_back, moved = sampling.euler is None, list[Instruction]()
    num = key.steps if looks_back else max(len(one.steps) for one in instructions)
    moves, shares = np.zeros((key.steps, num)), np.ones(key.steps)
    for one in instructions:
        assert isinstance(one, Compute | Forecast | Predict), "what comes from a schedule"
        begin, end = one.steps[0], one.steps[-1] + 1
        used = end if looks_back else len(one.steps)
        moved += [
            replace(one, velocity_slot=begin if looks_back else 0),
            Advance(one.steps, used, from_noise=looks_back),
        ]
        if sampling.euler is None:
            shares[begin], moves[begin, :used] = sampling.shares[end], sampling.shares[end] * sampling.moves[end, :used]
        else:
            shares[begin], moves[begin, :used] = composed(*(value[begin:end] for value in sampling.euler))
    numbers |= {"moves": moves, "shares": shares}
    return _program(key, moved, {**slots, VELOCITY: num}, sampling, coefficients, bias, **numbers)


def _on_its_graph(instruction: Instruction, sampling: Sampling) -> Instruction:
    """An instruction of a model with several compute graphs, on the one that runs its step."""
    if sampling.graphs is None or isinstance(instruction, Advance):
        return instruction
    if isinstance(instruction, Compute | ComputePositive):
        return replace(instruction, graph=sampling.graphs[instruction.step])
    raise InputError(NO_TAIL)


class _Slots:
    """Numbers slots from 0; the lowest free one is given first, so the slots ever given are always ``0 … capacity - 1``."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.capacity = 0

    def assign(self, owner: int) -> int:
        taken = set(self.live.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        self.live[owner] = slot
        self.capacity = max(self.capacity, slot + 1)
        return slot

    def release(self, last_read: Mapping[int, int], now: int) -> None:
        """Free the slots whose owner is not read at step ``now`` or later."""
        self.live = {owner: slot for owner, slot in self.live.items() if last_read[owner] >= now}


def _program(
    key: ProgramKey,
    instructions: list[Instruction],
    slots: Mapping[str, int],
    sampling: Sampling,
    coefficients: Array,
    bias: Array,
    **numbers: Array,
) -> Program:
    """``coefficients`` [T, G, S]; with ``rows_out`` [T, S], of the one group, it is a program of the output cut."""
    arrays: dict[str, Any] = {name: np.ascontiguousarray(value, np.float32) for name, value in numbers.items()}
    rows_out = arrays.pop("rows_out", None)
    return Program(
        key=key,
        instructions=tuple(_on_its_graph(one, sampling) for one in instructions),
        slots=slots,
        sigmas=sampling.sigmas.astype(np.float32),
        timesteps=sampling.timesteps.astype(np.float32),
        coefficients=np.ascontiguousarray(coefficients, np.float32),
        bias=bias.astype(np.float32),
        cut="hidden" if rows_out is None else "output",
        target_timesteps=sampling.targets,
        rows_out=None if rows_out is None else rows_out[:, None],
        **arrays,
    )
