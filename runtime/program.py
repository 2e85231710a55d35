"""Programs: what a session does at each step, decided ahead of time.

A program is a list of instructions over numbered slots. On the *hidden* cut slots hold features, and every step ends with
the sampler's Euler step. On the *output* cut slots hold velocities, and the latents move over a whole gap between computed
steps at once. On either cut velocities may be put into slots, and the latents moved by rows over them: where two branches of
guidance are combined first, and where the sampler looks back at earlier steps. The instructions name no method and test
nothing: the same request always makes the same calls.

Shapes: ``T`` sampling steps, ``G`` groups of what is kept (one on the output cut), ``S`` slots of the kind that the cut keeps,
``V`` of velocities.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, Literal, get_args

import numpy as np

from cachec.runtime.abi import ADVANCE, BRANCHES, CARRY, FEATURE, PAIR, VELOCITY
from cachec.runtime.errors import BundleError, InputError, shortened, unknown_name
from cachec.runtime.instructions import Instruction, check_known, read_instruction
from cachec.runtime.specs import Array
from cachec.runtime.starts import PREFIX, Start, pack_rows, read_starts

Cut = Literal["hidden", "output"]
KEPT: Mapping[Cut, str] = {"hidden": FEATURE, "output": VELOCITY}  # what the slots of a cut hold
UNCACHED = "uncached"  # the level of every bundle that computes every step


@dataclass(frozen=True)
class ProgramKey:
    """What a program is valid for. ``sizes`` are those of the request, by name; ``batch`` is ``None`` for any.

    ``guided``: a request has a negative branch beside the positive one, both of which the model runs on.
    """

    steps: int
    sigmas_hash: str
    sizes: Mapping[str, int]
    start_step: int = 0
    batch: int | None = None
    level: str = "default"
    guided: bool = False

    @property
    def sizes_text(self) -> str:
        """The sizes in words, for messages."""
        return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in self.sizes.items())


def hash_sigmas(sigmas: Array) -> str:
    """Sixteen hexadecimal digits that stand for a schedule of noise levels."""
    return hashlib.sha256(np.ascontiguousarray(sigmas, np.float32).tobytes()).hexdigest()[:16]


def composed(carry: Array, gain: Array) -> tuple[float, Array]:
    """Steps ``carry * latents + gain * velocity``, both [n], one after another: what is kept, and each velocity's worth [n]."""
    carry = np.asarray(carry, np.float64)
    behind = np.append(np.cumprod(carry[::-1])[::-1][1:], 1.0)  # of each step, what later ones keep
    return float(carry.prod()), (gain * behind).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Program:
    """Instructions plus their numbers.

    ``slots`` says how many there are of each kind. ``sigmas`` [T + 1] noise levels, the last one the end of sampling;
    ``timesteps`` [T] what the model is told at each step, ``target_timesteps`` [T] what flow maps are told besides;
    ``coefficients`` [T, G, S] and ``bias`` [T] of the linear forecasts (rows of other steps are not read; on the output cut a
    row moves the latents and the bias is zero). With a ``bias`` [T, 2] the groups are the branches of guidance, the negative
    one first. Where a sampler outside works on the output cut, it gets
    ``rows_out[s] @ slots + share_out[s] * latents`` at step ``s``: ``rows_out`` [T, G, S], ``share_out`` [T].

    What a step does to the latents: ``carry[s] * latents + gain[s] * velocity``, both [T]; without them the flow's Euler step,
    1 and the step in ``sigmas``. Instructions that move by rows: ``moves`` [T, V] on the hidden cut, and ``shares`` [T], 1
    without, of what they start from. Steps that compute one branch of guidance: ``pair_rows`` [T, 2, P] over the negative and
    the positive velocities of the pair slots, and ``pair_shares`` [T] of their own positive one. All float32.

    ``starts``: by step what is played from there on (``starting.py``), of methods whose numbers are made for any schedule.
    """

    key: ProgramKey
    instructions: tuple[Instruction, ...]
    slots: Mapping[str, int]
    sigmas: Array
    timesteps: Array
    coefficients: Array
    bias: Array
    cut: Cut = "hidden"
    target_timesteps: Array | None = None
    rows_out: Array | None = None
    share_out: Array | None = None
    carry: Array | None = None
    gain: Array | None = None
    moves: Array | None = None
    shares: Array | None = None
    pair_rows: Array | None = None
    pair_shares: Array | None = None
    starts: Mapping[int, Start] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cut not in get_args(Cut):
            raise BundleError(f"program: cut {shortened(self.cut)} is not one of {get_args(Cut)}")
        for kind, count in self.slots.items():
            if kind not in (*KEPT.values(), PAIR) or type(count) is not int or count < 1:
                raise BundleError(f"program: {shortened(count)} slots of {shortened(kind)} are not what a session can have")
        self._check_key()
        self._check_arrays()
        self._check_steps()
        self._check_slots()

    @property
    def num_steps(self) -> int:
        return self.key.steps

    @property
    def compute_steps(self) -> tuple[int, ...]:
        return tuple(step for one in self.instructions if one.computes for step in one.steps)

    @property
    def one_branch_steps(self) -> tuple[int, ...]:
        """Computed steps that run one branch of guidance only."""
        return tuple(step for one in self.instructions if one.computes and PAIR in one.reads for step in one.steps)

    def check_both_branches(self) -> None:
        """Raise ``InputError`` where a step computes one branch of guidance: a sampler outside asks for each of them apart."""
        if steps := self.one_branch_steps:
            raise InputError(
                f"level {self.key.level} computes one branch of guidance at steps {', '.join(map(str, steps))}, and a sampler "
                "outside combines them itself: take another level, or a session"
            )

    @property
    def has_branches(self) -> bool:
        """Are the branches of guidance forecast by numbers of their own, so that each has a bias?"""
        return self.bias.ndim == 2

    def of_branch(self, name: str | None) -> "Program":
        """What one branch of guidance plays, ``NEGATIVE`` or ``POSITIVE``, where a sampler outside asks for each apart.

        Raises:
            InputError: they have numbers of their own, and none of them is named.
        """
        if name is not None and name not in BRANCHES:
            raise unknown_name("branch", name, BRANCHES)
        if not self.has_branches:
            return self
        if name is None:
            raise InputError(
                f"level {self.key.level} forecasts the branches of guidance by numbers of their own, and which branch this is "
                f"was not said: name it, {' or '.join(BRANCHES)}, or take a predictor that both share (--set branches=shared)"
            )
        place = BRANCHES.index(name)
        coefficients = np.ascontiguousarray(self.coefficients[:, place : place + 1])
        return replace(self, starts={}, coefficients=coefficients, bias=np.ascontiguousarray(self.bias[:, place]))

    @property
    def work(self) -> float:
        """What is computed, in computed steps; one branch of two is half of one."""
        return sum(one.work for one in self.instructions)

    @property
    def capacity(self) -> int:
        """How many slots there are of the kind that the cut keeps."""
        return self.slots.get(KEPT[self.cut], 0)

    def _check_key(self) -> None:
        key = self.key
        batch = 1 if key.batch is None else key.batch
        for value, kind in ((key.steps, int), (key.start_step, int), (batch, int), (key.level, str), (key.guided, bool)):
            if type(value) is not kind:
                raise BundleError(f"program: its key says {shortened(value)} where {kind.__name__} belongs")

    def _check_arrays(self) -> None:
        steps, rows = self.key.steps, (self.key.steps, max(1, *self.coefficients.shape[1:2]), self.capacity)
        shapes: dict[str, tuple[int, ...]] = {
            "sigmas": (steps + 1,),
            "timesteps": (steps,),
            "coefficients": rows,
            "bias": (steps, len(BRANCHES)) if self.has_branches else (steps,),
            "target_timesteps": (steps,),
            "rows_out": rows,
            **dict.fromkeys(("share_out", CARRY, "gain", "shares", "pair_shares"), (steps,)),
            "moves": (steps, self.slots.get(VELOCITY, 0)),
            "pair_rows": (steps, 2, self.slots.get(PAIR, 0)),
        }
        for name, value in self.arrays().items():
            shape = shapes[name]
            if value.shape != shape or value.dtype != np.float32:
                raise BundleError(f"program: {name} is {value.dtype}{list(value.shape)}, expected float32{list(shape)}")
            if not np.isfinite(value).all():
                raise BundleError(f"program: {name} holds NaN or infinity")
        if hash_sigmas(self.sigmas) != self.key.sigmas_hash:
            raise BundleError("program: the sigmas are not the ones that its key names")

    def _check_steps(self) -> None:
        if not 0 <= self.key.start_step < self.key.steps:
            raise BundleError(f"program starts at step {self.key.start_step} of {self.key.steps}")
        for instruction in self.instructions:
            instruction.check()
        fits = self.key.guided and self.cut == "hidden" and self.coefficients.shape[1] == len(BRANCHES)
        if self.has_branches and not fits:
            raise BundleError("program: it has a bias for each branch, but is not guided, or has no coefficients of each")
        if self.cut == "output":
            self._check_output_cut()
        elif self.rows_out is not None or self.share_out is not None:
            raise BundleError("program: it has rows for a sampler outside, but nothing reads them on the hidden cut")
        if (self.carry is None) != (self.gain is None):
            raise BundleError("program: carry and gain belong together, and it has one of them")
        if self.key.guided and any(one.moves and one.graph != ADVANCE for one in self.instructions):
            raise BundleError("program: it is guided, but steps move the latents before both branches are combined")
        if PAIR in self.slots and (not self.key.guided or self.pair_rows is None or self.pair_shares is None):
            raise BundleError("program: it keeps both branches of guidance, but is not guided, or has no rows over them")
        covered = [step for instruction in self.instructions for step in instruction.moves]
        expected = range(self.key.start_step, self.key.steps)
        if covered != list(expected):
            raise BundleError(f"program covers steps {shortened(covered)}, expected each of {expected} once and in order")

    def _check_output_cut(self) -> None:
        """Each computed step is followed by the move that belongs to it."""
        if self.bias.any():
            raise BundleError("program: the bias is not zero, but nothing reads it on the output cut")
        if self.rows_out is None or self.share_out is None:
            raise BundleError("program: it has no rows for a sampler outside: compile the bundle again")
        for one, move in zip_longest(self.instructions[::2], self.instructions[1::2]):
            pair = one.computes and not one.moves and move is not None and not move.computes
            if not pair or move.steps[:1] != one.steps:
                raise BundleError(
                    "program: on the output cut each computed step is followed by its advance, "
                    f"got {shortened(one)}, {shortened(move)}"
                )

    def _check_slots(self) -> None:
        written: set[tuple[str, int]] = set()
        for instruction in self.instructions:
            steps = shortened(instruction.steps)
            for kind, numbers in instruction.reads.items():
                if not numbers:
                    raise BundleError(f"program: {instruction.op} of steps {steps} reads no slot")
                if unwritten := [number for number in numbers if (kind, number) not in written]:
                    raise BundleError(f"program: steps {steps} read {kind} slots {shortened(unwritten)} before any write")
            self._check_rows(instruction)
            for kind, numbers in instruction.writes.items():
                if wrong := [number for number in numbers if not 0 <= number < self.slots.get(kind, 0)]:
                    raise BundleError(f"program: {shortened(kind)} slot {wrong[0]} does not exist, "
                                      f"there are {self.slots.get(kind, 0)}")  # fmt: skip
                written |= {(kind, number) for number in numbers}

    def _check_rows(self, instruction: Instruction) -> None:
        if not instruction.rows:
            return
        weights, kinds = self.weights_of(instruction), set(instruction.reads)
        if weights is None or len(kinds) != 1 or (self.cut == "output" and FEATURE in kinds):
            raise BundleError(f"program: instruction {instruction.op!r} does not exist on the {self.cut} cut")
        bound = len(instruction.reads[kinds.pop()])
        out = None if self.rows_out is None or not instruction.moves else self.rows_out[list(instruction.moves), :, bound:]
        if weights[list(instruction.rows), :, bound:].any() or (out is not None and out.any()):
            raise BundleError(f"program: steps {shortened(instruction.steps)} have coefficients for slots that are not bound")

    def weights_of(self, instruction: Instruction) -> Array | None:
        """Rows [T, G, slots] that weigh what an instruction reads; ``None``: it has none of that kind."""
        if PAIR in instruction.reads:
            return self.pair_rows
        if self.cut == "output" or FEATURE in instruction.reads:
            return self.coefficients
        return None if self.moves is None else self.moves[:, None]

    def pair_weights(self, step: int, num_pairs: int) -> tuple[Array, Array]:
        """How a step forecasts the negative branch's velocity: weights [1, 2 P] of pairs, negative first, and its share [1]."""
        assert self.pair_rows is not None, "it has a step that reads pairs"
        assert self.pair_shares is not None, "it has a step that reads pairs"
        return self.pair_rows[step, :, :num_pairs].T.reshape(1, -1), self.pair_shares[step, None]

    def step_numbers(self, steps: Sequence[int]) -> tuple[float, Array]:
        """What a run of steps does: so much of the latents is kept, and each velocity is worth so much [n], float32."""
        if self.carry is None or self.gain is None:
            return 1.0, np.diff(self.sigmas)[list(steps)]
        return composed(self.carry[list(steps)], self.gain[list(steps)])

    def with_numbers(
        self, *, coefficients: Array | None = None, timesteps: Array | None = None, targets: Array | None = None
    ) -> "Program":
        """The same instructions with other rows or told times, which are not checked: closed loops try many."""
        other = copy.copy(self)
        others = {"coefficients": coefficients, "timesteps": timesteps, "target_timesteps": targets}
        for name, value in others.items():
            if value is not None:
                object.__setattr__(other, name, np.ascontiguousarray(value, np.float32))
        return other

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays (:meth:`stored`)."""
        instructions = [one.to_json() for one in self.instructions]
        own = {"key": asdict(self.key), "cut": self.cut, "slots": dict(self.slots), "instructions": instructions}
        return {**own, "starts": {str(step): one.to_json() for step, one in self.starts.items()}} if self.starts else own

    def arrays(self) -> dict[str, Array]:
        """All numbers by name; those that it may lack, only if it has them."""
        own = ("sigmas", "timesteps", "coefficients", "bias", "target_timesteps")
        moved = ("rows_out", "share_out", CARRY, "gain", "moves", "shares", "pair_rows", "pair_shares")
        return {name: np.asarray(value, order="C") for name in (*own, *moved) if (value := getattr(self, name)) is not None}

    def stored(self) -> dict[str, Array]:
        """All that a file of arrays holds: its own numbers, and those of later beginnings."""
        return {**self.arrays(), **pack_rows(self.starts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], arrays: Mapping[str, Array]) -> "Program":
        """Read what :meth:`to_json` and :meth:`stored` gave.

        Raises:
            BundleError: something is missing, unknown or impossible.
        """
        try:
            check_known(data, {"key", "cut", "slots", "instructions", "starts"}, "the file")
            check_known(data["key"], {one.name for one in fields(ProgramKey)}, "the key")
            instructions = tuple(read_instruction(one) for one in data["instructions"])
            own = {name: value for name, value in arrays.items() if not name.startswith(PREFIX)}
            starts = read_starts(data.get("starts", {}), {name: arrays[name] for name in arrays.keys() - own.keys()})
            return cls(ProgramKey(**data["key"]), instructions, data["slots"], cut=data["cut"], starts=starts, **own)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise BundleError(f"program file does not read as a program: {shortened(error)}") from error

    def digest(self) -> str:
        """Hash of everything that the program does, for logs and tests."""
        text = json.dumps(self.to_json(), sort_keys=True).encode()
        return hashlib.sha256(text + b"".join(a.tobytes() for a in self.stored().values())).hexdigest()
