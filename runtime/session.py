"""Sessions: play a program back on engines.

``B`` batch; everything a request needs lies in buffers that its session owns, so sessions of one bundle never share state
and may be interleaved. All calls are bound when the session is made; a request then only makes them.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from cachec.runtime.abi import MAX_BATCH
from cachec.runtime.binding import Binding, Operation
from cachec.runtime.bundle import Bundle, Manifest, Target
from cachec.runtime.device import Buffer, DeviceName
from cachec.runtime.engine import HOST, Call, Engine
from cachec.runtime.errors import EngineError, InputError, unknown_name
from cachec.runtime.noise import make_noise
from cachec.runtime.plan import ModelIO
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.specs import Array, TensorSpec
from cachec.runtime.trace import Trace

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class LoadedBundle:
    """A bundle with its engines loaded; a context manager. Open one with ``cachec.load``."""

    manifest: Manifest
    programs: Mapping[str, Program]
    engines: Mapping[str, Engine]
    target: Target

    def __repr__(self) -> str:
        model, levels = self.manifest.model["name"], ", ".join(self.programs)
        return f"<LoadedBundle: {model}, {self.manifest.method['name']}; levels {levels}; {self.target}>"

    @property
    def io(self) -> ModelIO:
        io = self.manifest.io
        return ModelIO(io["latents"], io["timestep"], tuple(io["conditions"]))

    @property
    def default_level(self) -> str:
        """The bundle's first level that is not the uncached one."""
        return next((level for level in self.programs if level != UNCACHED), UNCACHED)

    def session(self, *, batch: int = 1, level: str | None = None, for_sampler: bool = False) -> "Session":
        """A session for requests of ``batch`` samples at a quality level, by default the bundle's first.

        ``for_sampler``: for a sampler outside, which asks for velocities one by one.
        """
        if batch > (most := self.target.sizes.get("batch", (batch,))[-1]):
            raise InputError(
                f"batch is {batch}; the engines of {self.target} take up to {most}: build them with --max-batch {batch}, "
                "or take another target"
            )
        return Session(self.engines, self.programs[self.check_level(level)], self.io, batch=batch, for_sampler=for_sampler)

    def check_level(self, level: str | None) -> str:
        """The level, or the default one for ``None``.

        Raises:
            InputError: the bundle has no such level.
        """
        level = self.default_level if level is None else level
        if level not in self.programs:
            raise unknown_name("level", level, self.programs)
        return level

    def denoise(self, conditions: Mapping[str, Array], seeds: Sequence[int], *, level: str | None = None) -> Array:
        """Latents for ``len(seeds)`` samples, in one batch; conditions have that batch size."""
        session = self.session(batch=len(seeds), level=level)
        noise = np.stack([make_noise(seed, session.latent_shape[1:]) for seed in seeds])
        latents: Array = session.run(conditions, noise)
        return latents

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load_bundle(
    bundle: Bundle, target: Target, engine_type: type[Engine], *, device: DeviceName = HOST, threads: int | None = None
) -> LoadedBundle:
    """Load the engines of one target of an opened bundle with its back end's engine class."""
    programs = {level: bundle.program(level) for level in bundle.manifest.programs}
    files = {name: bundle.path(artifact.path) for name, artifact in target.engines.items()}
    signatures = {name: artifact.signature for name, artifact in target.engines.items()}
    weights = {name: bundle.path(path) for name, path in target.weights.items()}
    engines = engine_type.load(files, signatures, device=device, threads=threads, weights=weights, needs=target.needs)
    return LoadedBundle(bundle.manifest, programs, engines, target)


class Session:
    """One request at a time: ``begin``, then ``advance`` until ``finished``; or ``run``, which does all of it.

    With a sampler of one's own: ``begin``, then ``velocity`` for each step; made ``for_sampler``.

    Conditions, noise and latents are numpy arrays or, on a GPU, arrays of any library there that speaks DLPack or CUDA's array
    interface (torch tensors, CuPy arrays); float32 whatever the model's precision. Where the device can record calls, ``run``
    does so in its second request, and from then on starts all of a request at once.
    """

    def __init__(
        self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int = 1, for_sampler: bool = False
    ) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
        if program.key.batch not in (None, batch):
            raise InputError(f"batch is {batch}; this bundle was compiled for batches of {program.key.batch}")
        if for_sampler and not engines["compute"].device.calculates:
            name = engines["compute"].name
            raise InputError(
                f"a sampler outside cannot calculate with GPU buffers of the {name} backend: take inductor or aoti"
            )
        self.program = program
        self.io = io
        self.trace: Trace | None = None
        self._sizes = {"batch": batch}
        self._binding = Binding(engines, program, io, batch=batch, with_velocities=for_sampler)
        self._operations = self._binding.operations
        self._device = self._binding.device
        self._position = len(self._operations)
        self._velocities: dict[int, Buffer] = {}  # of coming steps, for a sampler outside
        self._has_run = False
        self._tried = False  # to record; not before the first request, which sets up what happens only once
        self._recording: Call | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents, batch first."""
        return self._binding.latent_spec.resolve(self._sizes)

    @property
    def ring(self) -> Buffer:
        """The slots [S, B, …]."""
        return self._binding.ring

    @property
    def recorded(self) -> bool:
        """Are requests replayed from one recording?"""
        return self._recording is not None

    @property
    def finished(self) -> bool:
        return self._position == len(self._operations)

    @property
    def latents(self) -> Array:
        """A copy of the current latents."""
        return self._device.download(self._binding.final if self.finished else self._operations[self._position].latents)

    def begin(self, conditions: Mapping[str, Buffer], noise: Buffer) -> None:
        """Start a request. Nothing of the session changes unless all inputs fit.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite (looked at on the host).
        """
        self._take(conditions, noise)
        self._start()

    def _take(self, conditions: Mapping[str, Buffer], noise: Buffer) -> None:
        specs = {spec.name: spec for spec in self._binding.condition_specs}
        if set(conditions) != set(specs):
            raise InputError(f"conditions are {sorted(specs)}, got {sorted(conditions)}")
        given, noise = {name: self._device.adopt(value) for name, value in conditions.items()}, self._device.adopt(noise)
        for name, spec in specs.items():
            self._check(spec, given[name])
        self._check(self._binding.latent_spec, noise)
        for name, value in given.items():
            self._device.upload(value, self._binding.conditions[name])
        self._device.upload(noise, self._binding.noise)

    def _check(self, spec: TensorSpec, value: Buffer) -> None:
        try:
            if isinstance(value, np.ndarray) or not self._device.owns(value):
                spec.check(value, self._sizes)
            else:
                spec.check_form(value, self._sizes)
        except InputError as error:
            if tuple(getattr(value, "shape", ())) == spec.resolve(self._sizes):
                raise
            key = self.program.key
            raise InputError(
                f"{error}; this session takes batches of {self._sizes['batch']}, and its bundle was compiled for "
                f"{key.width}x{key.height} pixels and {key.text_tokens} text tokens"
            ) from error

    def takes(self, value: Any) -> bool:
        """Is ``value`` a buffer of the device, so that it need not come from the host?"""
        return self._device.owns(value)

    def _start(self) -> None:
        if self._binding.prologue is not None:
            self._call("prologue", (), self._binding.prologue)
        self._position = 0
        self._velocities = {}

    def advance(self) -> None:
        """Carry out the next instruction."""
        if self.finished:
            raise InputError("this request is finished: call begin() with new noise first")
        operation = self._operations[self._position]
        self._call(operation.engine, operation.steps, operation.call)
        self._position += 1

    def run(self, conditions: Mapping[str, Buffer], noise: Buffer, *, on_device: bool = False) -> Buffer:
        """From noise to latents. Returns a copy that later requests leave alone.

        ``on_device``: a buffer of the device instead of a numpy array, without waiting for it to be ready: a torch tensor, or
        what ``torch.from_dlpack`` and its like take on a GPU without torch. It has memory of its own, which is freed with the
        last reference to it or to what was made from it, also after the session.
        """
        self._take(conditions, noise)
        self._velocities = {}
        if self._has_run and self.trace is None:
            self._record_once()
        if self._recording is None or self.trace is not None:
            self._play()
        else:
            self._recording.run()
            self._position = len(self._operations)
        self._has_run = True
        return self._device.copy(self._binding.final) if on_device else self.latents

    def _play(self) -> None:
        self._start()
        while not self.finished:
            self.advance()

    def _record_once(self) -> None:
        """Record all calls of a request, if the device can and it was not tried before."""
        if self._tried:
            return
        self._tried = True
        try:
            self._recording = self._device.record(self._play)
        except EngineError as error:
            log.warning("the calls of a request are made one by one: %s", error)

    def velocity(self, step: int, latents: Buffer) -> Buffer:
        """The velocity [B, …] at ``step`` and ``latents``, for a sampler outside that takes the steps in order.

        The velocity is a buffer of the engines' device: a numpy array on the CPU.

        On the output cut all steps of a gap get the same velocity, which brings a sampler of Euler's kind to the latents
        that the program wants at the end of the gap.

        Raises:
            InputError: another step is next, or the latents do not fit.
        """
        if step not in self._velocities:
            self._find_velocities(step, latents)
        return self._velocities.pop(step)

    def _find_velocities(self, step: int, latents: Buffer) -> None:
        wanted = None if self.finished else self._operations[self._position].steps[0]
        if step != wanted or self._velocities:
            due = min(self._velocities, default=wanted)
            raise InputError(f"step {step} was asked for, but {'no step' if due is None else f'step {due}'} is next")
        latents = self._device.adopt(latents)
        self._check(self._binding.latent_spec, latents)
        operation = self._operations[self._position]
        self._device.upload(latents, operation.latents)
        self.advance()
        if self.program.cut == "output":
            self._spread_gap(operation)
            return
        if operation.velocities is None:
            raise InputError("this session was not made for a sampler outside: make it with for_sampler=True")
        values = self._device.copy(operation.velocities)
        self._velocities = dict(zip(operation.steps, values, strict=True)) if len(values.shape) > len(latents.shape) else {
            operation.steps[0]: values
        }  # fmt: skip

    def _spread_gap(self, compute: Operation) -> None:
        """Carry out the move after a computed step of the output cut, and give each of its steps the mean velocity."""
        move = self._operations[self._position]
        before = self._device.copy(compute.latents)
        self.advance()
        after = self._binding.final if self.finished else self._operations[self._position].latents
        sigmas = self.program.sigmas
        velocity = (after - before) / float(sigmas[move.steps[-1] + 1] - sigmas[move.steps[0]])
        self._velocities = dict.fromkeys(move.steps, velocity)

    def _call(self, engine: str, steps: tuple[int, ...], call: Call) -> None:
        if self.trace is None:
            call.run()
            return
        start = time.perf_counter_ns()
        call.run()
        self._device.synchronize()
        details: dict[str, Any] = {"steps": list(steps)} if steps else {}
        self.trace.add(engine, start, time.perf_counter_ns(), **details)
