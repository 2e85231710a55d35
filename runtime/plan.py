"""What a session is made of before there is a device: its buffers, the calls on them, and where everything lies.

``B`` batch, ``S`` slots.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from cachec.runtime.abi import BATCH, BRANCHES, COEFFICIENTS, FORECASTS
from cachec.runtime.device import ALIGNMENT, Buffer
from cachec.runtime.errors import BundleError, InputError, shortened
from cachec.runtime.specs import Array, Signature, TensorSpec, itemsize

NOISE_BUFFER, TURNS, VELOCITY_BUFFER = "noise", ("latents/0", "latents/1"), "velocity"
Slot = tuple[str, int]  # its kind and number

MOST_GROUPS = 1 << 20  # rows for as many groups of channels at most


def condition_name(name: str) -> str:
    """Name of the buffer that holds the condition ``name``."""
    return f"condition/{name}"


def is_run(spec: TensorSpec) -> bool:
    """Does it have a row for each of several steps?"""
    return spec.shape[:1] == (FORECASTS,)


def for_groups(rows: Array, spec: TensorSpec) -> Array:
    """Rows [..., G, S] as an engine takes them: the row of one group, if that is all there is, is the row of each.

    Raises:
        BundleError: there are others than the engine has.
    """
    known, groups = rows.shape[-2], spec.shape[-2] if len(spec.shape) > 1 else None
    if not isinstance(groups, int) or not 1 <= groups <= MOST_GROUPS or known not in (1, groups):
        raise BundleError(
            f"the program has rows of {known} groups, and its engine weighs {shortened(groups)}: compile the bundle again"
        )
    return rows if known == groups else np.repeat(rows, groups, axis=-2)


def as_taken(numbers: Array, spec: TensorSpec, samples: int, *, has_branches: bool) -> Array:
    """Numbers of a step, or of each of a run [n, …], as an engine takes them on so many rows.

    ``has_branches``: of several rows each is of a branch of guidance, not of a group of channels.

    Raises:
        BundleError: they are of other groups or branches than the engine's.
    """
    if spec.name == COEFFICIENTS:
        if BATCH not in spec.shape or (numbers.shape[-2] > 1 and not has_branches):
            return for_groups(numbers, spec)
        return for_rows(numbers, samples, -2)
    if spec.shape[-1:] == (BATCH,):
        return for_rows(numbers if numbers.ndim == len(spec.shape) else numbers[..., None], samples, -1)
    if numbers.ndim != len(spec.shape):
        raise BundleError(f"the program has {spec.name} for each branch of guidance, which its engine does not take: "
                          "compile the bundle again")  # fmt: skip
    return numbers


def weighs_rows(signature: Signature) -> bool:
    """Does an engine that forecasts take weights for each row of a batch?"""
    return any(spec.name == COEFFICIENTS and BATCH in spec.shape for spec in signature.inputs)


def for_rows(numbers: Array, samples: int, axis: int) -> Array:
    """Numbers of G branches along an ``axis`` for each of ``samples`` rows: those of the branches lie one behind the other.

    Raises:
        BundleError: there are numbers of more than the rows of two branches.
    """
    known = numbers.shape[axis]
    if known not in (1, len(BRANCHES)) or samples % known:
        raise BundleError(
            f"the program has numbers of {known} branches of guidance for {samples} rows: compile the bundle again"
        )
    if known == 1:
        shape = list(numbers.shape)
        shape[axis] = samples
        return np.broadcast_to(numbers, shape)  # which takes no memory
    return np.repeat(numbers, samples // known, axis)


def no_velocities(who: str) -> InputError:
    """An error for engines that hand out none."""
    return InputError(f"{who} velocities, which these engines keep to themselves: compile the bundle without --no-velocities")


def slots_name(kind: str) -> str:
    """Name of the buffer that holds all slots of a kind."""
    return f"slots/{kind}"


@dataclass(frozen=True, eq=False)
class PlannedBuffer:
    """A C-contiguous buffer; ``value`` is what it holds for good, if it is a constant; of bfloat16 the bits, in uint16.

    ``same_as``: it is the memory of another one, seen in another shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: Array | None = None
    same_as: str | None = None

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

    ``latents`` is what it starts from, ``velocities`` what it leaves for a sampler outside, by step; the prologue has neither.
    ``reads``: for each velocity the slots that count for it, and the steps that these must hold; ``keeps``: slots, and the
    steps that they hold afterwards. ``computed`` is the model's answer, if the call computes.
    """

    engine: str
    steps: tuple[int, ...]
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]
    latents: View | None = None
    velocities: tuple[View, ...] = ()
    reads: tuple[Mapping[Slot, int], ...] = ()
    keeps: Mapping[Slot, int] = field(default_factory=dict)
    computed: View | None = None


@dataclass(frozen=True, eq=False)
class PlannedAside:
    """How a compute graph answers at any time: the time goes to the buffers ``told``, then the ``calls`` are made."""

    told: tuple[str, ...]
    calls: tuple[PlannedCall, ...]
    velocity: View


@dataclass(frozen=True, eq=False)
class BindingPlan:
    """All buffers of a session, by name, and the calls of each instruction, in order; ``final``: where the latents end up.

    The slots of a kind are one buffer [S, B, …], called ``slots_name``. ``noise`` and two more buffers [B, …] hold latents in
    turn, since an engine must not write what it reads; with a sampler outside, ``noise`` holds what it brings. Guided, they
    hold the same latents once for each branch. ``given``: what a request brings, by name, and where it goes; ``noises`` is
    where its noise does. ``asides``: compute graphs beside the program, by name, where a sampler outside may ask for any
    time.
    """

    buffers: Mapping[str, PlannedBuffer]
    prologue: PlannedCall | None
    by_instruction: tuple[tuple[PlannedCall, ...], ...]
    final: View
    latent_spec: TensorSpec
    given: Mapping[str, tuple[TensorSpec, View]]
    noises: tuple[View, ...]
    asides: Mapping[str, PlannedAside] = field(default_factory=dict)

    @cached_property
    def operations(self) -> tuple[PlannedCall, ...]:
        """The calls of all instructions."""
        return tuple(call for calls in self.by_instruction for call in calls)

    @property
    def calls(self) -> tuple[PlannedCall, ...]:
        """The prologue, if there is one, all operations, and those of the asides."""
        aside = (call for one in self.asides.values() for call in one.calls)
        return (*(() if self.prologue is None else (self.prologue,)), *self.operations, *aside)

    def shape(self, view: View) -> tuple[int, ...]:
        whole = self.buffers[view.buffer].shape
        if view.start is None:
            return whole
        return whole[1:] if view.stop is None else (len(view.rows(whole[0])), *whole[1:])

    def begin(self, view: View) -> int:
        """Where it begins in its buffer, in bytes."""
        buffer = self.buffers[view.buffer]
        return 0 if not view.start else view.start * (buffer.nbytes // buffer.shape[0])

    def check_names(self, conditions: Collection[str]) -> None:
        """Raise ``InputError`` unless these are what a request brings besides noise."""
        if set(conditions) != set(self.given):
            raise InputError(f"conditions are {sorted(self.given)}, got {sorted(conditions)}")

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


def part_of(buffer: Buffer, view: View) -> Buffer:
    """What a view covers of its buffer on a device."""
    if view.start is None:
        return buffer
    return buffer[view.start] if view.stop is None else buffer[view.start : view.stop]


def lay_out(plan: BindingPlan, scratch_bytes: int = 0) -> Layout:
    """Put the buffers one after another, each at a multiple of ``ALIGNMENT``."""
    offsets, end, constant_bytes = {}, 0, 0
    for buffer in sorted(plan.buffers.values(), key=lambda buffer: buffer.value is None):
        if buffer.same_as is not None:
            continue
        offsets[buffer.name] = end
        end = aligned(end + buffer.nbytes)
        constant_bytes = end if buffer.value is not None else constant_bytes
    offsets |= {name: offsets[one.same_as] for name, one in plan.buffers.items() if one.same_as is not None}
    return Layout(offsets, constant_bytes, end, scratch_bytes)


def constant_data(plan: BindingPlan, layout: Layout) -> Array:
    """What lies in the first ``layout.constant_bytes`` [bytes] uint8."""
    data = np.zeros(layout.constant_bytes, np.uint8)
    for buffer in plan.buffers.values():
        if buffer.value is not None:
            begin = layout.offsets[buffer.name]
            data[begin : begin + buffer.nbytes].view(buffer.value.dtype).reshape(buffer.shape)[...] = buffer.value
    return data


def aligned(size: int) -> int:
    """``size`` bytes, up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT
