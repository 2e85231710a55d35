"""Engines bound to batches ahead of time, and the copies of rows in and out: nothing is allocated when calls are made.

All batches lie in one piece of memory, the *arena*, in which one call is made at a time.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from statistics import median

from cachec.runtime.abi import BATCH
from cachec.runtime.device import Buffer, Device
from cachec.runtime.engine import Call, ExecutionContext
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.lane_costs import Costs
from cachec.runtime.lane_plan import LaneCall, Port
from cachec.runtime.plan import aligned
from cachec.runtime.specs import TensorSpec, itemsize

log = logging.getLogger(__name__)
REPEATS, ENOUGH = 7, 1.0  # how often a call is timed, and seconds after which it was often enough
Pieces = list[list[Buffer]]  # by tensor, in the port's order: contiguous parts that rows are copied from or to


@dataclass(frozen=True, eq=False)
class Ends:
    """Where one request's ``rows`` of the tensors of a call are; ``pad``: what stands in rows that nobody looks at."""

    rows: int
    inputs: Pieces
    pad: Pieces
    outputs: Pieces

    @classmethod
    def of(cls, call: LaneCall, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "Ends":
        """``outputs``: those that the request asks for."""
        port = call.port
        return cls(
            call.rows,
            [_pieces(port, spec, inputs[spec.name], 0, call.rows) for spec in port.inputs],
            [_pieces(port, spec, inputs[spec.name], 0, 1) for spec in port.inputs],
            [_pieces(port, spec, outputs[spec.name], 0, call.rows) if spec.name in outputs else [] for spec in port.outputs],
        )


def _pieces(port: Port, spec: TensorSpec, buffer: Buffer, start: int, stop: int) -> list[Buffer]:
    """Rows ``start`` to ``stop`` of a tensor; all of it if it has none."""
    return list(_rows(buffer, spec.shape.index(BATCH), start, stop)) if port.has_rows(spec) else [buffer]


def _rows(buffer: Buffer, axis: int, start: int, stop: int) -> Iterator[Buffer]:
    if axis == 0:
        yield buffer[start:stop]
        return
    for place in range(buffer.shape[0]):
        yield from _rows(buffer[place], axis - 1, start, stop)


class _Batch:
    """The call of a port in batches of ``bucket`` rows, its buffers in the arena."""

    def __init__(self, port: Port, bucket: int) -> None:
        self._port, self.bucket = port, bucket
        sizes = {**port.sizes, **({BATCH: bucket} if port.shares else {})}
        self._specs = (*port.inputs, *port.outputs)
        self._shapes = [spec.resolve(sizes) for spec in self._specs]
        self._offsets, self.nbytes = list[int](), 0
        for spec, shape in zip(self._specs, self._shapes, strict=True):
            self._offsets.append(self.nbytes)
            self.nbytes = aligned(self.nbytes + prod(shape) * itemsize(spec.dtype))
        self._at: dict[tuple[int, int], tuple[Pieces, Pieces]] = {}  # inputs and outputs of rows, by first and number
        self.call: Call

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: shape for spec, shape in zip(self._port.inputs, self._shapes, strict=False)}

    def bind(self, context: ExecutionContext, device: Device, arena: Buffer, rows: Iterable[int]) -> None:
        """Make the call, and cut the buffers to where requests of so many ``rows`` may come to lie."""
        placed = zip(self._specs, self._shapes, self._offsets, strict=True)
        buffers = [device.part(arena, offset, shape, spec.dtype) for spec, shape, offset in placed]
        count = len(self._port.inputs)
        named = [(spec.name, buffer) for spec, buffer in zip(self._specs, buffers, strict=True)]
        self.call = context.bind(dict(named[:count]), dict(named[count:]))
        for many in {1, *rows}:
            for start in range(self.bucket - many + 1):
                pieces = [
                    _pieces(self._port, spec, buffer, start, start + many)
                    for spec, buffer in zip(self._specs, buffers, strict=True)
                ]
                self._at[start, many] = (pieces[:count], pieces[count:])

    def run(self, device: Device, ends: Sequence[Ends]) -> None:
        """Make the call for these requests, and leave their results where they belong."""
        starts = list(accumulate((one.rows for one in ends), initial=0))
        for start, one in zip(starts, ends, strict=False):
            self._fill(device, start, one.rows, one.inputs, whole=not start)
        if self._port.shares:
            for start in range(starts[-1], self.bucket):
                self._fill(device, start, 1, ends[0].pad, whole=False)
        self.call.run()
        for start, one in zip(starts, ends, strict=False):
            for sources, targets in zip(self._at[start, one.rows][1], one.outputs, strict=True):
                if targets:
                    _copy(device, sources, targets)

    def _fill(self, device: Device, start: int, rows: int, given: Pieces, *, whole: bool) -> None:
        """Copy a request's rows, and, if ``whole``, what has none."""
        for spec, sources, targets in zip(self._port.inputs, given, self._at[start, rows][0], strict=True):
            if whole or self._port.has_rows(spec):
                _copy(device, sources, targets)


def _filled(batch: _Batch, example: Ends) -> list[Ends]:
    """As many of the same request as have room."""
    return [example] * (batch.bucket // example.rows)


def _copy(device: Device, sources: Sequence[Buffer], targets: Sequence[Buffer]) -> None:
    for source, target in zip(sources, targets, strict=True):
        device.upload(source, target)


class Ports:
    """The ports of all ``calls``, bound to the batches that ``buckets`` name.

    Raises:
        InputError: a request does not fit in any bucket, or the device has no room.
    """

    def __init__(self, calls: Iterable[LaneCall], buckets: Iterable[int], device: Device) -> None:
        self._device = device
        ports, rows = dict[str, Port](), dict[str, set[int]]()
        for call in calls:
            ports[call.port.name] = call.port
            rows.setdefault(call.port.name, set()).add(call.rows)
        self._batches = {
            name: {bucket: _Batch(port, bucket) for bucket in _fitting(port, rows[name], buckets)}
            for name, port in ports.items()
        }
        contexts: dict[int, ExecutionContext] = {id(one.engine): one.engine.context(device) for one in ports.values()}
        bound = [(contexts[id(port.engine)], batch, rows[name]) for name, port in ports.items()
                 for batch in self._batches[name].values()]  # fmt: skip
        room = max(batch.nbytes for _, batch, _ in bound)
        scratch = max(context.scratch_bytes(batch.input_shapes) for context, batch, _ in bound)
        arena = device.empty((room + scratch,), "uint8")
        if scratch:
            for context in contexts.values():
                context.scratch = arena[room:]
        for context, batch, counts in bound:
            batch.bind(context, device, arena, [count for count in counts if count <= batch.bucket])

    def run(self, port: Port, bucket: int, ends: Sequence[Ends]) -> None:
        """One call for these requests.

        Raises:
            EngineError: the engine failed; nothing was handed out.
        """
        self._batches[port.name][bucket].run(self._device, ends)

    def warm_up(self, examples: Mapping[str, Ends], clear: Callable[[], None]) -> None:
        """Make every call once, and let the device replay them from then on, where it can and gains by it.

        ``clear``: the lane of the ``examples``.
        """
        for name, batches in self._batches.items():
            clear()
            for batch in batches.values():
                batch.run(self._device, _filled(batch, examples[name]))
        self._device.synchronize()
        for name, batches in self._batches.items():
            for batch in batches.values():
                try:
                    batch.call = self._device.record(batch.call.run) or batch.call
                except EngineError as error:
                    log.warning("calls of %s, and all behind them, are made one by one: %s", name, error)
                    return

    def flat(self, seconds: float) -> Costs:
        """Costs of this much for every call."""
        return Costs({name: dict.fromkeys(batches, seconds) for name, batches in self._batches.items()})

    def measure(self, examples: Mapping[str, Ends], clear: Callable[[], None], clock: Callable[[], float]) -> Costs:
        """Seconds of every call in every batch, copies included: the median of some. ``clear``: as :meth:`warm_up`."""
        seconds = dict[str, dict[int, float]]()
        for name, batches in self._batches.items():
            clear()
            seconds[name] = self._time(batches, examples[name], clock)
        return Costs(seconds)

    def _time(self, batches: Mapping[int, _Batch], example: Ends, clock: Callable[[], float]) -> dict[int, float]:
        """The batches by turns: what slows the machine for a while must not make one size look worse than another."""
        took = {bucket: list[float]() for bucket in batches}
        while slow := [bucket for bucket, some in took.items() if len(some) < REPEATS and sum(some) < ENOUGH]:
            for bucket in slow:
                ends, start = _filled(batches[bucket], example), clock()
                batches[bucket].run(self._device, ends)
                self._device.synchronize()
                took[bucket].append(clock() - start)
        return {bucket: median(some) for bucket, some in took.items()}

    def of_these(self, costs: Costs) -> Costs:
        """``costs`` of these batches alone: other lanes' may be of more.

        Raises:
            InputError: they do not say what every call takes in every batch.
        """
        for name, batches in self._batches.items():
            known = costs.seconds.get(name, {})
            if missing := [bucket for bucket in batches if bucket not in known]:
                raise InputError(f"the costs lack {name} in batches of {missing}: leave them out, and they are measured")
        here = {name: {bucket: costs.seconds[name][bucket] for bucket in batches} for name, batches in self._batches.items()}
        return replace(costs, seconds=here)


def _fitting(port: Port, rows: Collection[int], buckets: Iterable[int]) -> list[int]:
    """The batches that its calls are made in."""
    if not port.shares:
        return [1]
    fitting = sorted({bucket for bucket in buckets if bucket >= min(rows)})
    if not fitting or fitting[-1] < max(rows):
        raise InputError(f"buckets are {list(buckets)}, but a request has {max(rows)} rows: name one of {max(rows)} or more")
    return fitting
