"""The buffers of a session while it is planned, and which rows of them are whose.

``B`` batch. A guided request runs the model on ``2 B`` rows: those of the negative branch, then those of the positive one.
"""

from collections.abc import Mapping
from math import prod

from cachec.runtime.abi import ADVANCE, BATCH, COMPUTE, GUIDE
from cachec.runtime.engine import Engine
from cachec.runtime.plan import PlannedBuffer, View
from cachec.runtime.specs import Array, TensorSpec


def tables_of(engines: Mapping[str, Engine]) -> dict[str, PlannedBuffer]:
    """What engines read at all calls, by input."""
    return {
        name: PlannedBuffer(f"table/{name}", table.shape, engine.signature.input(name).dtype, table)
        for engine in engines.values()
        for name, table in engine.tables.items()
    }


class PlannedBuffers:
    """Buffers found so far, by name. ``rows``: that the model runs on."""

    def __init__(self, batch: int, *, guided: bool) -> None:
        self.found: dict[str, PlannedBuffer] = {}
        self._batch, self._guided = batch, guided
        self.rows = 2 * batch if guided else batch

    def add(
        self, name: str, shape: tuple[int, ...], dtype: str, value: Array | None = None, same_as: str | None = None
    ) -> View:
        self.found[name] = PlannedBuffer(name, shape, dtype, value, same_as)
        return View(name)

    def take(self, buffer: PlannedBuffer) -> View:
        """One that was planned before."""
        self.found[buffer.name] = buffer
        return View(buffer.name)

    def add_like(self, name: str, spec: TensorSpec, **sizes: int) -> View:
        """One that holds what a graph which runs the model takes or gives."""
        return self.add(name, self.resolve(spec, COMPUTE, **sizes), spec.dtype)

    def resolve(self, spec: TensorSpec, graph: str, **sizes: int) -> tuple[int, ...]:
        """The shape of an input or output of a graph: those that move or combine latents see no branches."""
        return spec.resolve({BATCH: self._batch if graph in (ADVANCE, GUIDE) else self.rows, **sizes})

    def branches(self, buffer: str) -> tuple[View, ...]:
        """The rows of each branch of a buffer [rows, …], the positive one's last; all of it if there is one only."""
        size = self._batch
        return (View(buffer, 0, size), View(buffer, size, 2 * size)) if self._guided else (View(buffer),)

    def branch(self, whole: View) -> View:
        """The positive branch's rows of a whole buffer."""
        return self.branches(whole.buffer)[-1]

    def positive(self, view: View) -> View:
        """The positive branch's rows of a buffer [2 B, …], or of a step's in one [n, 2 B, …]."""
        if view.start is None:
            return self.branch(view)
        begin = 2 * self._batch * view.start + self._batch
        return View(self.one_by_one(view.buffer), begin, begin + self._batch)

    def one_by_one(self, name: str) -> str:
        """A buffer [n, m, …] seen as [n m, …]."""
        kept = self.found[name]
        return self.add(f"{name}/rows", (prod(kept.shape[:2]), *kept.shape[2:]), kept.dtype, same_as=name).buffer

    def by_batch(self, name: str) -> str:
        """A buffer [n, m, …] seen as [n m / B, B, …]."""
        kept, size = self.found[name], self._batch
        shape = (prod(kept.shape[:2]) // size, size, *kept.shape[2:])
        return self.add(f"{name}/by batch", shape, kept.dtype, same_as=name).buffer
