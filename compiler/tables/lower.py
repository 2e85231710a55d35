"""Lowering: from a schedule and coefficients to a program with slots."""

from collections.abc import Mapping

import numpy as np

from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import VELOCITY
from cachec.runtime.instructions import Advance, Compute, Forecast, Instruction, Predict
from cachec.runtime.program import KEPT, Cut, Program, ProgramKey
from cachec.runtime.specs import Array


def lower(table: ForecastTable | AdvanceTable, key: ProgramKey, sigmas: Array, timesteps: Array) -> Program:
    """A program of the cut that the table is of."""
    if isinstance(table, ForecastTable):
        return lower_table(table, key, sigmas, timesteps)
    return lower_advance(table, key, sigmas, timesteps)


def lower_table(table: ForecastTable, key: ProgramKey, sigmas: Array, timesteps: Array) -> Program:
    """A program for the linear forecast engine.

    Slots go to computed features by liveness: from the step that writes one to the last step that reads it.
    """
    schedule = table.schedule
    row_of = {step: i for i, step in enumerate(schedule.compute)}
    last_read = {step: int(max(np.flatnonzero(table.coefficients[:, i]), default=-1)) for step, i in row_of.items()}
    for step in schedule.forecast:  # a row without any weight (a pure bias) still binds its newest feature
        newest = max(s for s in schedule.compute if s < step)
        last_read[newest] = max(last_read[newest], step)
    slots = _Slots()
    coefficients = np.zeros((schedule.num_steps, max(len(row_of), 1)), np.float32)
    bias = table.bias.astype(np.float32)
    instructions: list[Instruction] = []
    run: list[int] = []  # forecast steps since the last computed one
    for step in range(schedule.num_steps):
        slots.release(last_read, step)
        if run and step in row_of:
            instructions.append(Forecast(tuple(run), slots.capacity))
            run = []
        if step in row_of:
            slot = slots.assign(step) if last_read[step] >= 0 else None
            instructions.append(Compute(step, slot))
            continue
        for owner, slot in slots.live.items():
            coefficients[step, slot] = table.coefficients[step, row_of[owner]]
        run.append(step)
    if run:
        instructions.append(Forecast(tuple(run), slots.capacity))
    return _program(key, instructions, slots.capacity, sigmas, timesteps, coefficients, bias)


def lower_predictor(
    schedule: Schedule, window: int, *, feeds_back: bool, key: ProgramKey, sigmas: Array, timesteps: Array
) -> Program:
    """A program for a forecast engine with the predictor inside: slots hold every feature that a later step looks at."""
    histories = {step: schedule.history(step, window, feeds_back=feeds_back) for step in schedule.forecast}
    last_read: dict[int, int] = {}
    for step, history in histories.items():
        last_read.update(dict.fromkeys(history, step))
    slots = _Slots()
    instructions: list[Instruction] = []
    for step in range(schedule.num_steps):
        if step not in histories:
            slots.release(last_read, step)
            instructions.append(Compute(step, slots.assign(step) if step in last_read else None))
            continue
        sources = tuple(slots.live[source] for source in histories[step])
        slots.release(last_read, step)  # not those read now: the result must not overwrite them
        slot = slots.assign(step) if step in last_read else None
        instructions.append(Predict(step, sources, slot))
    coefficients = np.zeros((schedule.num_steps, slots.capacity), np.float32)
    bias = np.zeros(schedule.num_steps, np.float32)
    return _program(key, instructions, slots.capacity, sigmas, timesteps, coefficients, bias)


def lower_advance(table: AdvanceTable, key: ProgramKey, sigmas: Array, timesteps: Array) -> Program:
    """A program for the output cut: it needs no forecast engine. Every velocity keeps its own slot to the end.

    A sampler outside gets the mean velocity of each gap, which brings one of Euler's kind to where the program moves.
    """
    schedule, num = table.schedule, len(table.schedule.compute)
    rows = np.tril(table.coefficients)
    coefficients, out = np.zeros((2, schedule.num_steps, num))
    coefficients[list(schedule.compute)] = rows
    timesteps = timesteps.copy()
    if table.timesteps is not None:
        timesteps[list(schedule.compute)] = table.timesteps
    instructions: list[Instruction] = []
    moves = np.diff(rows, axis=0, prepend=0.0)
    for slot, (step, end) in enumerate(zip(schedule.compute, [*schedule.compute[1:], schedule.num_steps], strict=True)):
        instructions += [Compute(step, slot, VELOCITY), Advance(tuple(range(step, end)), slot + 1)]
        out[step:end] = moves[slot] / (float(sigmas[end]) - float(sigmas[step]))
    bias = np.zeros(schedule.num_steps, np.float32)
    return _program(key, instructions, num, sigmas, timesteps, coefficients, bias, out)


def lower_uncached(key: ProgramKey, sigmas: Array, timesteps: Array) -> Program:
    """The same sampling with every step computed: what a cached run is compared with."""
    instructions: list[Instruction] = [Compute(step) for step in range(key.start_step, key.steps)]
    return _program(key, instructions, 0, sigmas, timesteps, np.zeros((key.steps, 0)), np.zeros(key.steps, np.float32))


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
    capacity: int,
    sigmas: Array,
    timesteps: Array,
    coefficients: Array,
    bias: Array,
    rows_out: Array | None = None,
) -> Program:
    """``coefficients`` and ``rows_out`` [T, S] of the one group; with ``rows_out`` it is one of the output cut."""
    cut: Cut = "hidden" if rows_out is None else "output"
    return Program(
        key=key,
        instructions=tuple(instructions),
        slots={KEPT[cut]: capacity} if capacity else {},
        sigmas=sigmas.astype(np.float32),
        timesteps=timesteps.astype(np.float32),
        coefficients=np.ascontiguousarray(coefficients[:, None, :capacity], np.float32),
        bias=bias,
        cut=cut,
        rows_out=None if rows_out is None else np.ascontiguousarray(rows_out[:, None], np.float32),
        share_out=None if rows_out is None else np.zeros(key.steps, np.float32),
    )
