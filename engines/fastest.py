"""``--target auto``: every back end that runs on a device is built there and timed, one after the other; the fastest is kept.

Two are there at a time, the fastest so far and the next one. They are timed by turns, so that what else the machine does meets
both, and the slower one goes at once, with its files. What is compared is a request: what its calls of every engine come to, at
the sizes that it has, on random inputs (zeros in bfloat16, which numpy has not).
"""

import logging
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachec.engines.backends import get_builder
from cachec.engines.build_target import build_into, check_build, load_collected
from cachec.engines.targets import PREFERENCE, PREFERENCE_ON_CPU, TargetName, find_fit
from cachec.runtime.abi import ADVANCE, FORECAST, FORECASTS, PROLOGUE, SLOTS
from cachec.runtime.build_options import BuildOptions, SizeRange, shape_range
from cachec.runtime.builder import Sources
from cachec.runtime.bundle import Target
from cachec.runtime.device import CUDA, Buffer, Device, DeviceName
from cachec.runtime.engine import Call, Engine
from cachec.runtime.errors import CachecError, EngineError, InputError, in_one_line
from cachec.runtime.specs import TensorSpec
from cachec.runtime.write import Collector

log = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "eager"  # what the others must equal; nobody serves it
ROUNDS = (5, 50)  # at least, at most
SECONDS = 1.0  # of rounds, if they are that quick
PAUSE = 0.02  # seconds; threads of OpenMP and of ONNX Runtime spin for some milliseconds after a call
QUICK = 0.1  # seconds; calls below find their caches cold after the other's turn, so one more is made before


def check_alone(names: Sequence[str]) -> None:
    """Raise ``InputError`` if ``auto`` is asked for with others."""
    if others := [name for name in names if name != AUTO]:
        raise InputError(f"target {AUTO} takes the fastest of all: leave {', '.join(others)} out")


def candidates(device: DeviceName) -> tuple[TargetName, ...]:
    """The back ends to look at."""
    order = PREFERENCE if device.kind == CUDA else PREFERENCE_ON_CPU
    return tuple(TargetName(name) for name in order if name != REFERENCE)


def find_usable(
    names: Sequence[TargetName], precisions: Iterable[str], device: DeviceName, options: BuildOptions, *, max_batch: int = 1
) -> tuple[tuple[TargetName, ...], dict[str, str]]:
    """Those that can be built and run here, and why not the others. Nothing is built for it.

    Raises:
        InputError: none can, or an option is for none of them.
    """
    usable, failed = [], dict[str, str]()
    for name in names:
        try:
            builder = get_builder(name.backend)
            for precision in precisions:
                builder.engine.check_target(device, precision)
                builder.check_build(device, precision, options)
            builder.engine.check_needs(builder.needs(device, options.only(builder.options)), device)
            usable.append(name)
        except (CachecError, ImportError, OSError) as error:  # a broken installation is none of the others' business
            failed[str(name)] = in_one_line(error, 400)
    if not usable:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise InputError(f"no back end can be built and run on {device} here:{reasons}")
    for precision in precisions:
        check_build(usable, precision, device, options, max_batch=max_batch)
    return tuple(usable), failed


@dataclass(eq=False)
class _Contender:
    """A target that was built; ``seconds`` are medians by graph, ``beside`` what it was compared with: both the last time."""

    name: TargetName
    target: Target
    build_seconds: float
    sources: Sources
    writer: Collector
    device: DeviceName
    sizes: Mapping[str, SizeRange]
    engines: Mapping[str, Engine] | None = None
    calls: "_Calls | None" = None
    load_seconds: float = 0.0
    seconds: Mapping[str, float] | None = None
    beside: "_Contender | None" = None
    beside_seconds: float = 0.0

    def load(self) -> "_Calls":
        """Load the engines and make all calls that happen only once, unless that was done."""
        if self.calls is None:
            start = time.perf_counter()
            fit = find_fit(self.target, self.device)
            if fit.error is not None:
                raise fit.error
            self.engines = load_collected(fit, self.sources, self.writer)
            self.calls = _Calls(self.engines, self.sizes)
            self.load_seconds = time.perf_counter() - start
        return self.calls

    def close(self) -> None:
        for engine in (self.engines or {}).values():
            engine.close()
        self.engines = self.calls = None

    def drop(self) -> None:
        self.close()
        _drop(self.writer, self.name, self.sources)

    def row(self, ratio: float) -> dict[str, Any]:
        """What the manifest says of it."""
        seconds = self.seconds or {}
        beside = None if self.beside is None else {"name": str(self.beside.name), "request_seconds": self.beside_seconds}
        return {
            "version": self.target.version,
            "ratio": round(ratio, 3),
            "request_seconds": _request_seconds(seconds, self.sizes),
            "beside": beside,
            "seconds": dict(seconds),
            "build_seconds": round(self.build_seconds, 2),
            "load_seconds": round(self.load_seconds, 2),
        }


def keep_fastest(
    names: Sequence[TargetName],
    sources: Sources,
    writer: Collector,
    device: DeviceName,
    options: BuildOptions,
    failed: Mapping[str, str],
) -> tuple[Target, dict[str, Any]]:
    """Build and time all; returns the one whose files are left, and what was measured, as the manifest keeps it.

    ``failed``: why others are not among ``names``. ONNX files stay, whichever is kept.

    Raises:
        EngineError: none can be built and run.
    """
    reasons, ratios, all_timed = dict(failed), dict[str, float](), list[_Contender]()
    best: _Contender | None = None
    try:
        for name in names:
            try:
                new = _build(name, sources, writer, device, options)
                ratio = _compare(best, new)
            except Exception as error:  # whatever a library raises that cannot build or run: the others may
                reasons[str(name)] = in_one_line(error, 400)
                log.warning("%s is left out: %s", name, reasons[str(name)])
                _drop(writer, name, sources)
                continue
            all_timed.append(new)
            if best is not None and ratio >= 1:
                ratios[str(name)] = ratio
                new.drop()
                continue
            ratios = {known: value / ratio for known, value in ratios.items()} | {str(name): 1.0}
            if best is not None:
                best.drop()
            best = new
    finally:
        if best is not None:
            best.close()
    if best is None:
        raise none_left(reasons)
    rows = {str(one.name): one.row(ratios[str(one.name)]) for one in sorted(all_timed, key=lambda one: ratios[str(one.name)])}
    return best.target, {"device": str(device), "kept": str(best.name), "targets": rows, "failed": reasons}


def none_left(reasons: Mapping[str, str]) -> EngineError:
    """``reasons``: why each back end is left out."""
    return EngineError("no back end can be built and run: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def _build(name: TargetName, sources: Sources, writer: Collector, device: DeviceName, options: BuildOptions) -> _Contender:
    log.warning("building for %s …", name)
    start = time.perf_counter()
    target = build_into(writer, sources, name, device=device, options=options, apart=True)
    return _Contender(name, target, time.perf_counter() - start, sources, writer, device, options.sizes)


def _drop(writer: Collector, name: TargetName, sources: Sources) -> None:
    """Its own files; those that the ONNX target has, too, lie elsewhere."""
    writer.drop(f"engines/{name}-{sources.precision}")


def _compare(best: _Contender | None, new: _Contender) -> float:
    """The time of a request on ``new`` over that on ``best``: by turns, or one after the other where both find no room."""
    sides = [new] if best is None else [best, new]
    try:
        try:
            rounds = _time_by_turns([side.load() for side in sides])
        except CachecError as error:
            if best is None:
                raise
            log.info("%s and %s are timed one after the other: %s", best.name, new.name, error)
            rounds = [_time_alone(side) for side in sides]
    except BaseException:
        new.close()
        raise
    for side, found in zip(sides, rounds, strict=True):
        side.seconds = _medians(found)
    if best is not None:
        for side, other in ((best, new), (new, best)):
            side.beside, side.beside_seconds = other, _request_seconds(other.seconds or {}, new.sizes)
    times = [[_request_seconds(one, new.sizes) for one in found] for found in rounds]
    if len({len(one) for one in times}) == 1:
        return statistics.median(b / a for a, b in zip(times[0], times[-1], strict=True))
    return statistics.median(times[-1]) / statistics.median(times[0])


def _time_alone(side: _Contender) -> list[dict[str, float]]:
    """Rounds of one that is loaded for them only."""
    side.close()
    try:
        return _time_by_turns([side.load()])[0]
    finally:
        side.close()


def _request_seconds(seconds: Mapping[str, float], sizes: Mapping[str, SizeRange]) -> float:
    return sum(count * seconds[name] for name, count in count_calls(seconds, sizes).items())


def count_calls(names: Iterable[str], sizes: Mapping[str, SizeRange]) -> dict[str, int]:
    """How often a request calls each engine: usual numbers of computed steps and of forecasts of one call."""
    names, steps, computed = list(names), sizes[SLOTS].most, sizes[SLOTS].usual
    others = {
        PROLOGUE: 1,
        FORECAST: math.ceil((steps - computed) / sizes[FORECASTS].usual),
        ADVANCE: 0 if FORECAST in names else computed,
    }
    return {name: others.get(name, computed) for name in names}


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _time_by_turns(sides: Sequence["_Calls"]) -> list[list[dict[str, float]]]:
    """Seconds by graph of every round, of every side."""
    found: list[list[dict[str, float]]] = [[] for _ in sides]
    begun = time.perf_counter()
    while len(found[0]) < ROUNDS[0] or (len(found[0]) < ROUNDS[1] and time.perf_counter() - begun < SECONDS):
        for index in range(len(sides)) if len(found[0]) % 2 else reversed(range(len(sides))):
            time.sleep(PAUSE)
            found[index].append(sides[index].timed())
    return found


class _Calls:
    """A call of every engine of a target, bound to buffers of its own."""

    def __init__(self, engines: Mapping[str, Engine], sizes: Mapping[str, SizeRange]) -> None:
        self._device = next(iter(engines.values())).device.for_session()
        self._kept: list[object] = []  # libraries know addresses only
        self._calls: dict[str, Call] = {name: self._bind(engine, sizes) for name, engine in engines.items()}
        self._quick = False
        for _ in range(3):  # compiles, allocates, records: what happens only once
            self._quick = sum(self.timed().values()) < QUICK
        self._calls = {name: self._recorded(name, call) for name, call in self._calls.items()}

    def _bind(self, engine: Engine, sizes: Mapping[str, SizeRange]) -> Call:
        random = np.random.default_rng(0)
        context = engine.context(self._device)
        inputs = {spec.name: _filled(self._device, spec, sizes, random) for spec in engine.signature.inputs}
        outputs = {spec.name: _empty(self._device, spec, sizes) for spec in engine.signature.outputs}
        shapes = {name: tuple(buffer.shape) for name, buffer in inputs.items()}
        if (scratch := context.scratch_bytes(shapes)) > 0:
            context.scratch = self._device.empty((scratch,), "uint8")
        call = context.bind(inputs, outputs)
        self._kept += [context, inputs, outputs, call]
        return call

    def _recorded(self, name: str, call: Call) -> Call:
        """As sessions make it: from a recording, where there can be one."""
        try:
            return self._device.record(call.run) or call
        except EngineError as error:
            log.info("calls of %s are timed one by one: %s", name, error)
            return call

    def timed(self) -> dict[str, float]:
        """Seconds of each call."""
        seconds = {}
        for name, call in self._calls.items():
            if self._quick:
                self._run(call)
            start = time.perf_counter()
            self._run(call)
            seconds[name] = time.perf_counter() - start
        return seconds

    def _run(self, call: Call) -> None:
        call.run()
        self._device.synchronize()


def _empty(device: Device, spec: TensorSpec, sizes: Mapping[str, SizeRange]) -> Buffer:
    return device.empty(shape_range(spec, sizes)[1], spec.dtype)


def _filled(device: Device, spec: TensorSpec, sizes: Mapping[str, SizeRange], random: np.random.Generator) -> Buffer:
    """From 0 to 1; numbers of steps are 0."""
    buffer = _empty(device, spec, sizes)
    if spec.dtype.startswith("float"):
        device.upload(random.random(tuple(buffer.shape)).astype(spec.dtype), buffer)
    return buffer
