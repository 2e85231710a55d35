"""What a program keeps for requests that begin at a later step: the numbers that differ from its own, and no more.

Shapes: as ``program.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cachec.runtime.abi import PAIR
from cachec.runtime.errors import BundleError, shortened
from cachec.runtime.instructions import check_known, read_instruction
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.runtime.program import Program

ROWS = ("coefficients", "bias", "rows_out", "share_out", "moves", "shares", "pair_rows", "pair_shares")
PREFIX = "start."  # of their names in a file


@dataclass(frozen=True, eq=False)
class Start:
    """A program from one step on.

    ``instructions`` are as JSON has them, without what they have by default: most are never played, and are read when one is.
    ``rows``: by name those of its numbers [T - step, …] that are not the whole program's.
    """

    instructions: tuple[Mapping[str, Any], ...]
    slots: Mapping[str, int]
    rows: Mapping[str, Array]

    @classmethod
    def of(cls, begun: "Program", whole: "Program") -> "Start":
        """``begun`` is lowered for the same steps as ``whole``, and begins at a later one."""
        first, own, known = begun.key.start_step, begun.arrays(), whole.arrays()
        rows = {name: own[name][first:] for name in ROWS if name in own}
        other = {name: row for name, row in rows.items() if not np.array_equal(row, known[name][first:])}
        return cls(tuple(one.to_json() for one in begun.instructions), begun.slots, other)

    def begun(self, whole: "Program", step: int) -> "Program":
        """The program from ``step`` on, whose numbers these are. Raises ``BundleError`` where they are none of it."""
        try:
            instructions = tuple(map(read_instruction, self.instructions))
            numbers: dict[str, Any] = {
                name: np.concatenate([np.zeros((step, *row.shape[1:]), row.dtype), row]) for name, row in self.rows.items()
            }
            if PAIR not in self.slots:
                numbers |= dict.fromkeys(("pair_rows", "pair_shares"))
            key = replace(whole.key, start_step=step)
            return replace(whole, key=key, instructions=instructions, slots=self.slots, starts={}, **numbers)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise BundleError(f"program file does not read as a program from step {step} on: {shortened(error)}") from error

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {"slots": dict(self.slots), "instructions": list(self.instructions)}


def pack_rows(starts: Mapping[int, Start]) -> dict[str, Array]:
    """All rows by names that say of which step they are."""
    return {
        f"{PREFIX}{step}.{name}": np.array(row, order="C") for step, one in starts.items() for name, row in one.rows.items()
    }


def read_starts(data: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[int, Start]:
    """Read what :meth:`Start.to_json` gave by step, and :func:`pack_rows`.

    Raises:
        BundleError: something is unknown.
        TypeError, KeyError, AttributeError, ValueError: it does not read as that.
    """
    starts, used = dict[int, Start](), set[str]()
    for text, one in data.items():
        check_known(one, {"slots", "instructions"}, f"start step {shortened(text)}")
        stored = {name: key for name in ROWS if (key := f"{PREFIX}{text}.{name}") in arrays}
        used |= {*stored.values()}
        rows = {name: arrays[key] for name, key in stored.items()}
        starts[int(text)] = Start(tuple(one["instructions"]), {**one["slots"]}, rows)
    check_known(dict.fromkeys(arrays), used, "the file of numbers")
    return starts
