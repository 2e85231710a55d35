"""Instructions: the engine calls that a program is made of. Each says what it does.

Shapes: as ``program.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from cachec.runtime.abi import ADVANCE, COMPUTE, FEATURE, FORECAST, PAIR, VELOCITY
from cachec.runtime.errors import BundleError, shortened

MOST = 1 << 16  # steps and slots of a program


class Instruction(ABC):
    """One engine call. It says what it does, so that nobody has to ask which instruction it is."""

    op: ClassVar[str]
    computes: ClassVar[bool] = False  # does it run the whole model?
    work: ClassVar[float] = 0.0  # of a computed step, all branches of guidance counted
    from_noise: bool = False  # are latents moved from where the request began, not from where they are?

    @property
    @abstractmethod
    def graph(self) -> str:
        """The engine that runs it."""

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The steps that it is about, in order."""

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:
        """Slots by kind, in the order in which the engine takes them. A kind is the name of the tensor that is kept."""
        return {}

    @property
    def writes(self) -> Mapping[str, tuple[int, ...]]:
        """Slots by kind, one after the other: one for each step of a run."""
        return {}

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of the program's coefficients that weigh what it reads; none where it weighs nothing."""
        return ()

    @property
    def moves(self) -> tuple[int, ...]:
        """The steps that the latents take; they stand at the end of the last one afterwards."""
        return () if VELOCITY in self.writes else self.steps

    def to_json(self) -> dict[str, Any]:
        """As :func:`read_instruction` reads it; what it has by default is left out."""
        return {
            "op": self.op,
            **{name: value for name, value in vars(self).items() if value != getattr(type(self), name, None)},
        }

    def check(self) -> None:
        """Raise ``BundleError`` unless its numbers are numbers, and each slot that it reads outlives it."""
        read, written = ([n for some in side.values() for n in some] for side in (self.reads, self.writes))
        if not all(type(number) is int for number in (*self.steps, *read, *written)) or not isinstance(self.graph, str):
            raise BundleError(f"program: {shortened(self)} does not read as an instruction")
        for kind, slots in self.writes.items():
            if lost := sorted({*slots} & {*self.reads.get(kind, ())}):
                raise BundleError(f"program: steps {shortened(self.steps)} write {kind} slot {lost[0]}, which they read")


@dataclass(frozen=True)
class Compute(Instruction):
    """Run the whole model at ``step``; keep what it ``keeps`` in ``slot`` unless nothing reads it (``None``).

    One that keeps the velocity, alone or in ``velocity_slot``, leaves the latents to the ``Advance`` behind it. A guided
    request's velocities, before they are combined, go to ``pair_slot``.
    """

    op: ClassVar[str] = "compute"
    computes: ClassVar[bool] = True
    work: ClassVar[float] = 1.0
    step: int
    slot: int | None = None
    keeps: str = FEATURE
    graph: str = COMPUTE
    velocity_slot: int | None = None
    pair_slot: int | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)

    @property
    def writes(self) -> Mapping[str, tuple[int, ...]]:
        return _run(self.keeps, self.slot) | _run(VELOCITY, self.velocity_slot) | _run(PAIR, self.pair_slot)

    @property
    def moves(self) -> tuple[int, ...]:
        return () if self.keeps == VELOCITY else super().moves


@dataclass(frozen=True)
class ComputePositive(Instruction):
    """Run the model at ``step`` on the positive branch alone, forecast the negative one's velocity, and combine both.

    The forecast is ``program.pair_shares[step]`` of the positive branch's velocity, plus those of both branches in the pair
    slots ``0 … num_pairs - 1``, weighted by ``program.pair_rows[step, :, :num_pairs]``. What is combined goes to ``slot``.
    """

    op: ClassVar[str] = "compute-positive"
    computes: ClassVar[bool] = True
    work: ClassVar[float] = 0.5
    step: int
    slot: int
    num_pairs: int
    graph: str = COMPUTE

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:
        return {PAIR: tuple(range(self.num_pairs))}

    @property
    def writes(self) -> Mapping[str, tuple[int, ...]]:
        return _run(VELOCITY, self.slot)

    @property
    def rows(self) -> tuple[int, ...]:
        return self.steps


@dataclass(frozen=True)
class Forecast(Instruction):
    """Forecast the steps of ``span`` linearly from the feature slots ``0 … num_slots - 1``.

    Step ``s`` takes ``program.coefficients[s, :, :num_slots]`` and ``program.bias[s]``. With a ``velocity_slot`` the velocities
    go there and to the slots behind it, and the latents are left to the ``Advance`` behind.
    """

    op: ClassVar[str] = "forecast"
    span: tuple[int, ...]
    num_slots: int
    graph: str = FORECAST
    velocity_slot: int | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        return self.span

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:
        return {FEATURE: tuple(range(self.num_slots))}

    @property
    def writes(self) -> Mapping[str, tuple[int, ...]]:
        return _run(VELOCITY, self.velocity_slot, len(self.span))

    @property
    def rows(self) -> tuple[int, ...]:
        return self.span


@dataclass(frozen=True)
class Predict(Instruction):
    """Run the predictor inside the forecast engine at ``step`` on ``sources``, feature slots from newest to oldest.

    The predicted feature goes to ``slot`` (``None``: nothing reads it).
    """

    op: ClassVar[str] = "predict"
    step: int
    sources: tuple[int, ...]
    slot: int | None = None
    graph: str = FORECAST
    velocity_slot: int | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:
        return {FEATURE: self.sources}

    @property
    def writes(self) -> Mapping[str, tuple[int, ...]]:
        return _run(FEATURE, self.slot) | _run(VELOCITY, self.velocity_slot)


@dataclass(frozen=True)
class Advance(Instruction):
    """Move the latents over ``span``: a share of the noise, or of the latents before it, plus weighted velocities.

    The velocities were just made, or the first of them was. The weights over the velocity slots ``0 … num_slots - 1`` are
    ``program.coefficients[span[0], :, :num_slots]`` on the output cut and ``program.moves[span[0], :num_slots]`` on the
    hidden one, the share is ``program.shares[span[0]]``.
    """

    op: ClassVar[str] = "advance"
    span: tuple[int, ...]
    num_slots: int
    graph: str = ADVANCE
    from_noise: bool = True

    @property
    def steps(self) -> tuple[int, ...]:
        return self.span

    @property
    def reads(self) -> Mapping[str, tuple[int, ...]]:
        return {VELOCITY: tuple(range(self.num_slots))}

    @property
    def rows(self) -> tuple[int, ...]:
        return self.span[:1]


def _run(kind: str, slot: int | None, length: int = 1) -> dict[str, tuple[int, ...]]:
    """Slots of a kind from ``slot`` on, if it is one."""
    return {kind: tuple(range(slot, slot + length)) if type(slot) is int else (slot,)} if slot is not None else {}


_INSTRUCTIONS: dict[str, type[Compute | ComputePositive | Forecast | Predict | Advance]] = {
    kind.op: kind for kind in (Compute, ComputePositive, Forecast, Predict, Advance)
}


def check_known(data: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raise ``BundleError`` if ``what`` of a program has other keys than the ``known`` ones."""
    if unknown := sorted(map(str, set(data) - known)):
        raise BundleError(
            f"program: {what} says {shortened(unknown)}, which this cachec does not know: "
            "install the cachec that wrote it, or compile the bundle again"
        )


def read_instruction(data: Mapping[str, Any]) -> Instruction:
    """An instruction from JSON.

    Raises:
        BundleError: there is none of this kind, or it says what this one does not know.
        TypeError, KeyError, AttributeError: it does not read as one.
    """
    kind = _INSTRUCTIONS.get(data["op"])
    if kind is None:
        raise BundleError(f"program: there is no instruction {shortened(data['op'])}; known are {', '.join(_INSTRUCTIONS)}")
    check_known(data, {"op", *(field.name for field in fields(kind))}, f"instruction {kind.op!r}")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "op"}
    for name, value in given.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and not 0 <= number < MOST for number in numbers):
            raise BundleError(
                f"program: {name} of instruction {kind.op!r} is {shortened(value)}, expected numbers below {MOST}"
            )
    return kind(**given)
