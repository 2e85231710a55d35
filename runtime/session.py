"""Sessions: play a program back on engines.

``B`` batch; everything a request needs lies in buffers that its session owns, so sessions of one bundle never share state
and may be interleaved. All calls are bound when the session is made; a request then only makes them.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from cachec.runtime.abi import BATCH, GUIDANCE, PROLOGUE, negative_name
from cachec.runtime.binding import Binding, not_finite
from cachec.runtime.bundle import Bundle, Manifest, Target
from cachec.runtime.device import Buffer
from cachec.runtime.engine import Call, Engine
from cachec.runtime.errors import EngineError, InputError, unknown_name
from cachec.runtime.model_io import ModelIO
from cachec.runtime.noise import make_noise
from cachec.runtime.own_levels import at_elsewhere, with_sigmas
from cachec.runtime.program import UNCACHED, Program
from cachec.runtime.specs import Array
from cachec.runtime.starting import starting_beside
from cachec.runtime.stepper import Stepper
from cachec.runtime.texts import fit_texts
from cachec.runtime.trace import Trace

if TYPE_CHECKING:
    from cachec.runtime.origin import Origin

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class LoadedBundle:
    """A bundle with its engines loaded; a context manager. Open one with ``cachec.load``.

    It is of one size, number of steps and length of texts; :meth:`at` gives the others, whose engines are loaded when needed.
    """

    manifest: Manifest
    programs: Mapping[str, Program]
    engines: Mapping[str, Engine]
    target: Target
    origin: "Origin | None" = None
    drop_in: "Callable[..., Any] | None" = None
    front: "Callable[[LoadedBundle], Any] | None" = None  # makes what turns prompts into pictures
    plain: "LoadedBundle | None" = None  # what it is without the noise levels that it was given

    def __repr__(self) -> str:
        model, levels = self.manifest.model["name"], ", ".join(self.programs)
        return f"<LoadedBundle: {model}, {self.manifest.method['name']}; levels {levels}; {self.target}>"

    @property
    def io(self) -> ModelIO:
        return ModelIO.from_json(self.manifest.io)

    @property
    def default_level(self) -> str:
        """The bundle's first level that is not the uncached one."""
        return next((level for level in self.programs if level != UNCACHED), UNCACHED)

    def at(self, size: str | None = None, steps: int | None = None, text: int | None = None) -> "LoadedBundle":
        """The bundle at another size, ``832x1216`` say, number of steps, and length of texts; ``None`` is what it is at.

        Raises:
            InputError: the bundle lacks it; with what there is.
        """
        if (size, steps, text) == (None, None, None):
            return self
        if self.plain is not None:
            return at_elsewhere(self, self.plain, size, steps, text)
        if self.origin is None:
            self.manifest.at(size, steps, text)
            return self
        (own,), length = self.manifest.variants, self.manifest.settings.get("text_tokens")
        wanted = own.size if size is None else size, own.steps if steps is None else steps, length if text is None else text
        there = self.origin.open(*wanted)
        return replace(there, drop_in=self.drop_in, front=self.front)

    def with_sigmas(self, sigmas: Sequence[float]) -> "LoadedBundle":
        """The bundle at noise levels as its pipeline's call takes them, one a step: by its Programs, or every step computed.

        Raises:
            InputError: as :func:`cachec.runtime.own_levels.with_sigmas`.
        """
        return with_sigmas(self.plain or self, sigmas)

    @property
    def texts(self) -> tuple[int, ...]:
        """The lengths of texts that :meth:`at` takes, the longest last; none where the bundle does not say."""
        return (self.manifest if self.bundle is None else self.bundle.manifest).texts

    def conditions(self, level: str | None = None) -> tuple[str, ...]:
        """What requests of a level bring besides noise, by name: what engines read, of both branches where there are two."""
        read = {spec.name for engine in self.target.engines.values() for spec in engine.signature.inputs}
        names = tuple(name for name in self.io.conditions if name in read)
        is_guided = self.programs[self.check_level(level)].key.guided
        return (*names, *map(negative_name, names), GUIDANCE) if is_guided else names

    def fitted(self, conditions: Mapping[str, Array]) -> tuple["LoadedBundle", Mapping[str, Array]]:
        """The bundle at the shortest of its lengths that holds the texts of these numpy arrays, and the arrays at that length.

        Raises:
            InputError: none holds them.
        """
        length, fitted = fit_texts(self.io, conditions, self.texts)
        return self.at(text=length), fitted

    @property
    def bundle(self) -> Bundle | None:
        """The whole bundle, of all sizes; ``None`` if the engines come from elsewhere."""
        return None if self.origin is None else self.origin.bundle

    def as_transformer(self, transformer: Any, *, pipeline: Any = None, level: str | None = None) -> Any:
        """What an unmodified diffusers pipeline calls in the place of its ``transformer``: see ``docs/diffusers.md``.

        ``pipe.transformer = cachec.load("x.cachec").as_transformer(pipe.transformer, pipeline=pipe)``. ``level``: of quality,
        by default the bundle's first.

        Raises:
            InputError: the transformer or the pipeline's scheduler is not what the bundle was compiled from; or the bundle was
                not opened by ``cachec.load``.
        """
        if self.drop_in is None:
            raise InputError("only a bundle that cachec.load opened can stand in a pipeline")
        return self.drop_in(self.plain or self, transformer, pipeline=pipeline, level=self.check_level(level))

    @property
    def generator(self) -> Any:
        """What makes pictures of prompts, a ``cachec.pictures.generator.Generator``: one for the bundle at all its sizes.

        Raises:
            InputError: the bundle has no text encoders and decoder, or was not opened by ``cachec.load``.
        """
        if self.front is None or self.origin is None:
            raise InputError("only a bundle that cachec.load opened makes pictures of prompts")
        return self.origin.once(partial(self.front, self.plain or self))

    def generate(
        self, prompts: Sequence[str], *, seeds: Sequence[int] | None = None, level: str | None = None,
        guidance: float | None = None, true_cfg_scale: float | None = None, negative_prompts: Sequence[str] | None = None,
        pictures: Array | None = None, strength: float | None = None, size: str | None = None, steps: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Array:  # fmt: skip
        """Pictures [B, H, W, 3] or videos [B, F, H, W, 3] of prompts, uint8: text encoders, denoise loop and decoder.

        ``seeds`` of their noise, by default 0, 1, …. ``guidance`` and ``true_cfg_scale``: by default the bundle's scales;
        ``negative_prompts`` of guidance's negative branch, by default no text. ``size`` and ``steps``: as :meth:`at`;
        ``sigmas``: as :meth:`with_sigmas`. ``pictures`` [B, H, W, 3], uint8, to begin with in the place of noise alone, of that
        size: the last ``strength`` of the steps are made, by default 0.6 of them, as diffusers counts.

        Raises:
            InputError: the bundle cannot do what is asked for, or has no text encoders and decoder, or none of pictures.
        """
        (own,) = self.manifest.variants
        if self.plain is not None and sigmas is None and steps in (None, own.steps):
            sigmas = own.settings["sigmas"]
        steps = steps or own.steps if sigmas is None else steps
        there = {"size": size or own.size, "steps": steps, "level": level, "sigmas": sigmas}
        scales = {"guidance": guidance, "true_cfg_scale": true_cfg_scale, "negative_prompts": negative_prompts}
        first = {"pictures": pictures, "strength": strength}
        made: Array = self.generator.generate(prompts, seeds=seeds, **there, **scales, **first)
        return made

    @overload
    def session(
        self, *, batch: int = 1, level: str | None = None, size: str | None = None, steps: int | None = None,
        text: int | None = None, start: int = 0, for_sampler: Literal[False] = False,
    ) -> "Session": ...  # fmt: skip

    @overload
    def session(
        self, *, batch: int = 1, level: str | None = None, size: str | None = None, steps: int | None = None,
        text: int | None = None, start: int = 0, for_sampler: Literal[True], branch: str | None = None,
    ) -> Stepper: ...  # fmt: skip

    def session(
        self, *, batch: int = 1, level: str | None = None, size: str | None = None, steps: int | None = None,
        text: int | None = None, start: int = 0, for_sampler: bool = False, branch: str | None = None,
    ) -> "Session | Stepper":  # fmt: skip
        """A session for requests of ``batch`` samples at a quality level, by default the bundle's first.

        ``size``, ``steps`` and ``text``: as :meth:`at`; texts are that long. ``start``: the step that requests begin at, with
        latents of its noise level (``programs[level].sigmas[start]``) in the place of noise. ``for_sampler``: for one outside,
        which asks for velocities one by one, and for each ``branch`` of guidance ("negative", "positive") apart.
        """
        bundle = self.at(size, steps, text)
        program = bundle.programs[bundle.check_level(level)]
        rows = 2 if program.key.guided and not for_sampler else 1  # that the model runs on for each sample
        if rows * batch > (most := bundle.target.sizes.get(BATCH, (rows * batch,))[-1]):
            raise InputError(
                f"batch is {batch}; the engines of {bundle.target} take up to {most // rows}: build them with --max-batch "
                f"{batch}, or take another target"
            )
        if branch is not None and not for_sampler:
            raise InputError(f"branch is {branch}, which is for a sampler outside (for_sampler): a session plays both")
        if for_sampler:
            return Stepper(bundle.engines, bundle.begun(program, start).of_branch(branch), bundle.io, batch=batch)
        return Session(bundle.engines, bundle.begun(program, start), bundle.io, batch=batch)

    def begun(self, program: Program, start: int) -> Program:
        """A program of this bundle from step ``start`` on. Raises ``InputError`` if it cannot begin there."""
        return starting_beside(self.programs[UNCACHED], program, start) if start else program

    def check_level(self, level: str | None) -> str:
        """The level, or the default one for ``None``.

        Raises:
            InputError: the bundle has no such level.
        """
        level = self.default_level if level is None else level
        if level not in self.programs:
            raise unknown_name("level", level, self.programs)
        return level

    def denoise(
        self,
        conditions: Mapping[str, Array],
        seeds: Sequence[int],
        *,
        level: str | None = None,
        size: str | None = None,
        steps: int | None = None,
    ) -> Array:
        """Latents for ``len(seeds)`` samples, in one batch; conditions have that batch size, and texts any length.

        They are played at the shortest that holds them (:meth:`fitted`).
        """
        bundle, conditions = self.at(size, steps).fitted(conditions)
        session = bundle.session(batch=len(seeds), level=level)
        noise = np.stack([make_noise(seed, session.latent_shape[1:]) for seed in seeds])
        latents: Array = session.run(conditions, noise)
        return latents

    def close(self) -> None:
        """Close the engines, those of other sizes, too."""
        if self.origin is not None:
            self.origin.close()
            return
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session:
    """One request at a time: ``begin``, then ``advance`` until ``finished``; or ``run``, which does all of it.

    With a sampler of one's own: a ``Stepper``.

    Conditions, noise and latents are numpy arrays or, on a GPU, arrays of any library there that speaks DLPack or CUDA's array
    interface (torch tensors, CuPy arrays); float32 whatever the model's precision. Where the device can record calls, ``run``
    does so in its second request, and from then on starts all of a request at once.
    """

    def __init__(self, engines: Mapping[str, Engine], program: Program, io: ModelIO, *, batch: int = 1) -> None:
        self.program = program
        self.io = io
        self.trace: Trace | None = None
        self._binding = Binding(engines, program, io, batch=batch)
        self._instructions = self._binding.by_instruction
        self._device = self._binding.device
        self._position = len(self._instructions)
        self._has_run = False
        self._tried = False  # to record; not before the first request, which sets up what happens only once
        self._recording: Call | None = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a request brings besides noise, by name."""
        return self._binding.conditions

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents, batch first."""
        return self._binding.latent_shape

    @property
    def slots(self) -> Mapping[str, Buffer]:
        """The slots [S, B, …] by kind."""
        return self._binding.slots

    @property
    def recorded(self) -> bool:
        """Are requests replayed from one recording?"""
        return self._recording is not None

    @property
    def finished(self) -> bool:
        return self._position == len(self._instructions)

    @property
    def latents(self) -> Array:
        """A copy of the current latents."""
        return self._device.download(self._binding.final if self.finished else self._instructions[self._position][0].latents)

    def begin(self, conditions: Mapping[str, Buffer], noise: Buffer) -> None:
        """Start a request. Nothing of the session changes unless all inputs fit.

        Raises:
            InputError: a condition is missing, unknown, of the wrong shape or dtype, or not finite (looked at on the host).
        """
        self._binding.take(conditions, noise)
        self._start()

    def takes(self, value: Any) -> bool:
        """Is ``value`` a buffer of the device, so that it need not come from the host?"""
        return self._device.owns(value)

    def _start(self) -> None:
        if self._binding.prologue is not None:
            self._call(PROLOGUE, (), self._binding.prologue)
        self._position = 0

    def advance(self) -> None:
        """Carry out the next instruction."""
        if self.finished:
            raise InputError("this request is finished: call begin() with new noise first")
        for operation in self._instructions[self._position]:
            self._call(operation.engine, operation.steps, operation.call)
        self._position += 1

    def run(self, conditions: Mapping[str, Buffer], noise: Buffer, *, on_device: bool = False) -> Buffer:
        """From noise to latents. Returns a copy that later requests leave alone.

        ``on_device``: a buffer of the device instead of a numpy array, without waiting for it to be ready: a torch tensor, or
        what ``torch.from_dlpack`` and its like take on a GPU without torch. It has memory of its own, which is freed with the
        last reference to it or to what was made from it, also after the session. It is not looked at: it may hold NaN.

        Raises:
            InputError: the request does not fit.
            EngineError: the latents hold NaN or infinity; says from which step on.
        """
        self._binding.take(conditions, noise)
        if self._has_run and self.trace is None:
            self._record_once()
        if self._recording is None or self.trace is not None:
            self._play()
        else:
            self._recording.run()
            self._position = len(self._instructions)
        self._has_run = True
        if on_device:
            return self._device.copy(self._binding.final)
        latents = self.latents
        if not np.isfinite(latents).all():
            raise not_finite("the latents", self.program.key.level, self._first_bad_place())
        return latents

    def _first_bad_place(self) -> str:
        """Play the request again, and look after each call."""
        self._start()
        while not self.finished:
            steps = self._instructions[self._position][0].steps
            self.advance()
            if not np.isfinite(self.latents).all():
                return f"after step {steps[-1]}" if len(steps) == 1 else f"after steps {steps[0]} to {steps[-1]}"
        return "at the end"

    def take_numbers(self, *, coefficients: Array | None = None, timesteps: Array | None = None) -> None:
        """Play coming requests with other rows or told times than the program's, or with its own again; nothing is checked."""
        self._binding.take_numbers(coefficients=coefficients, timesteps=timesteps)

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

    def _call(self, engine: str, steps: tuple[int, ...], call: Call) -> None:
        if self.trace is None:
            call.run()
            return
        start = time.perf_counter_ns()
        call.run()
        self._device.synchronize()
        details: dict[str, Any] = {"steps": list(steps)} if steps else {}
        self.trace.add(engine, start, time.perf_counter_ns(), **details)
