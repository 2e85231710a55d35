"""Programs: what a session does at each step, decided ahead of time.

A program is a list of instructions over numbered slots. On the *hidden* cut slots hold features, and every step ends with
the sampler's Euler step. On the *output* cut slots hold velocities, and the latents move over a whole gap between computed
steps at once. The instructions name no method and test nothing: the same request always makes the same calls.

Shapes: ``T`` sampling steps, ``S = capacity`` slots.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from cachec.runtime.errors import BundleError
from cachec.runtime.specs import Array

Branch = Literal["conditional", "unconditional"]
Cut = Literal["hidden", "output"]
UNCACHED = "uncached"  # the level of every bundle that computes every step


@dataclass(frozen=True)
class Compute:
    """Run the whole model at ``step``; keep its feature (or velocity) in ``slot`` unless nothing reads it (``None``)."""

    op: ClassVar[str] = "compute"
    step: int
    slot: int | None
    branch: Branch = "conditional"

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)


@dataclass(frozen=True)
class Forecast:
    """Forecast ``steps`` linearly from the slots ``0 … num_slots - 1``.

    Step ``s`` takes ``program.coefficients[s, :num_slots]`` and ``program.bias[s]``.
    """

    op: ClassVar[str] = "forecast"
    steps: tuple[int, ...]
    num_slots: int
    branch: Branch = "conditional"


@dataclass(frozen=True)
class Predict:
    """Run the predictor inside the forecast engine at ``step`` on ``sources``, slots from newest to oldest.

    The predicted feature goes to ``slot`` (``None``: nothing reads it). ``source_steps`` says which step each source is of.
    """

    op: ClassVar[str] = "predict"
    step: int
    sources: tuple[int, ...]
    source_steps: tuple[int, ...]
    slot: int | None
    branch: Branch = "conditional"

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)

    def check(self) -> None:
        """Raise ``BundleError`` unless every source has its step, in the past, and none is overwritten."""
        if not self.sources or len(self.sources) != len(self.source_steps):
            raise BundleError(f"program: step {self.step} has sources {self.sources} of steps {self.source_steps}")
        if max(self.source_steps) >= self.step:
            raise BundleError(f"program: step {self.step} reads steps {self.source_steps}, which are not before it")
        if self.slot in self.sources:
            raise BundleError(f"program: step {self.step} writes slot {self.slot}, which it reads")


@dataclass(frozen=True)
class Advance:
    """Move the latents over ``steps``, the first of which was just computed: noise plus weighted velocities.

    The weights are ``program.coefficients[steps[0], :num_slots]`` over the slots ``0 … num_slots - 1``.
    """

    op: ClassVar[str] = "advance"
    steps: tuple[int, ...]
    num_slots: int
    branch: Branch = "conditional"


Instruction = Compute | Forecast | Predict | Advance
_INSTRUCTIONS: dict[str, type[Instruction]] = {c.op: c for c in (Compute, Forecast, Predict, Advance)}
_ON_CUT: dict[Cut, tuple[type[Instruction], ...]] = {"hidden": (Compute, Forecast, Predict), "output": (Compute, Advance)}


@dataclass(frozen=True)
class ProgramKey:
    """What a program is valid for. ``batch`` is ``None`` where the engines take any batch."""

    steps: int
    sigmas_hash: str
    height: int
    width: int
    text_tokens: int
    start_step: int = 0
    batch: int | None = None
    level: str = "default"


def hash_sigmas(sigmas: Array) -> str:
    """Sixteen hexadecimal digits that stand for a schedule of noise levels."""
    return hashlib.sha256(np.ascontiguousarray(sigmas, np.float32).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Program:
    """Instructions plus their numbers.

    ``sigmas`` [T + 1] noise levels, the last one the end of sampling; ``timesteps`` [T] what the model is told at each
    step; ``coefficients`` [T, S] and ``bias`` [T] of the linear forecasts (rows of other steps are not read; on the output
    cut a row moves the latents and the bias is zero). All float32.
    """

    key: ProgramKey
    instructions: tuple[Instruction, ...]
    capacity: int
    sigmas: Array
    timesteps: Array
    coefficients: Array
    bias: Array
    cut: Cut = "hidden"

    def __post_init__(self) -> None:
        self._check_arrays()
        self._check_steps()
        self._check_slots()

    @property
    def num_steps(self) -> int:
        return self.key.steps

    @property
    def compute_steps(self) -> tuple[int, ...]:
        return tuple(i.step for i in self.instructions if isinstance(i, Compute))

    def _check_arrays(self) -> None:
        steps = self.key.steps
        shapes = {
            "sigmas": (steps + 1,),
            "timesteps": (steps,),
            "coefficients": (steps, self.capacity),
            "bias": (steps,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or value.dtype != np.float32:
                raise BundleError(f"program: {name} is {value.dtype}{list(value.shape)}, expected float32{list(shape)}")
            if not np.isfinite(value).all():
                raise BundleError(f"program: {name} holds NaN or infinity")
        if hash_sigmas(self.sigmas) != self.key.sigmas_hash:
            raise BundleError("program: the sigmas are not the ones that its key names")

    def _check_steps(self) -> None:
        if not 0 <= self.key.start_step < self.key.steps:
            raise BundleError(f"program starts at step {self.key.start_step} of {self.key.steps}")
        if self.cut not in get_args(Cut):
            raise BundleError(f"program: cut {self.cut!r} is not one of {get_args(Cut)}")
        for instruction in self.instructions:
            if not isinstance(instruction, _ON_CUT[self.cut]):
                raise BundleError(f"program: instruction {instruction.op!r} does not exist on the {self.cut} cut")
        if self.cut == "output" and self.bias.any():
            raise BundleError("program: the bias is not zero, but nothing reads it on the output cut")
        movers = self.instructions if self.cut == "hidden" else self._advances()
        covered = [step for instruction in movers for step in instruction.steps]
        expected = list(range(self.key.start_step, self.key.steps))
        if covered != expected:
            raise BundleError(f"program covers steps {covered}, expected each of {expected} once and in order")

        for instruction in self.instructions:
            if instruction.branch not in get_args(Branch):
                raise BundleError(f"program: branch {instruction.branch!r} is not one of {get_args(Branch)}")
            if isinstance(instruction, Predict):
                instruction.check()

    def _advances(self) -> list[Advance]:
        """The moves of an output-cut program; each belongs to the computed step before it."""
        computes, advances = self.instructions[::2], self.instructions[1::2]
        for compute, advance in zip_longest(computes, advances):
            if not isinstance(compute, Compute) or not isinstance(advance, Advance) or compute.steps != advance.steps[:1]:
                raise BundleError(
                    f"program: on the output cut each computed step is followed by its advance, got {compute}, {advance}"
                )
        return [advance for advance in advances if isinstance(advance, Advance)]

    def _check_slots(self) -> None:
        written: set[int] = set()
        for instruction in self.instructions:
            if isinstance(instruction, Forecast | Advance):
                reads: tuple[int, ...] = tuple(range(instruction.num_slots))
                if not reads:
                    raise BundleError(f"program: {instruction.op} of steps {instruction.steps} reads no slot")
                rows = list(instruction.steps) if isinstance(instruction, Forecast) else [instruction.steps[0]]
                if self.coefficients[rows, instruction.num_slots :].any():
                    raise BundleError(f"program: steps {instruction.steps} have coefficients for slots that are not bound")
            else:
                reads = instruction.sources if isinstance(instruction, Predict) else ()
            unwritten = set(reads) - written
            if unwritten:
                raise BundleError(f"program: steps {instruction.steps} read slots {sorted(unwritten)} before any write")
            slot = None if isinstance(instruction, Forecast | Advance) else instruction.slot
            if slot is not None:
                if not 0 <= slot < self.capacity:
                    raise BundleError(f"program: slot {slot} does not exist, there are {self.capacity}")
                written.add(slot)

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays (:meth:`arrays`)."""
        instructions = [{"op": i.op, **asdict(i)} for i in self.instructions]
        return {"key": asdict(self.key), "cut": self.cut, "capacity": self.capacity, "instructions": instructions}

    def arrays(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in ("sigmas", "timesteps", "coefficients", "bias")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], arrays: Mapping[str, Array]) -> "Program":
        try:
            instructions = tuple(_read_instruction(i) for i in data["instructions"])
            key = ProgramKey(**data["key"])
            return cls(key=key, instructions=instructions, capacity=data["capacity"], cut=data["cut"], **arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"program file does not read as a program: {error!r}") from error

    def digest(self) -> str:
        """Hash of everything that the program does, for logs and tests."""
        text = json.dumps(self.to_json(), sort_keys=True).encode()
        return hashlib.sha256(text + b"".join(a.tobytes() for a in self.arrays().values())).hexdigest()


def _read_instruction(data: Mapping[str, Any]) -> Instruction:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "op"}
    return _INSTRUCTIONS[data["op"]](**fields)
