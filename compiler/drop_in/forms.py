"""What a pipeline was compiled to: one form for each size and number of steps.

``B`` batch, ``T`` steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.stand_in import BACK
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program
from cachec.runtime.specs import Array, TensorSpec
from cachec.runtime.stepper import Stepper

ROUNDING = 1e-5  # of timesteps in float32, whichever way they were calculated
NOISE_LEVELS = 1e-5  # by which sigmas may differ


@dataclass(frozen=True, eq=False)
class Schedule:
    """A scheduler of diffusers at the start of a run: its class, its settings, and the levels that these lead to.

    ``levels``: sigmas [T + 1], or timesteps [T] where it has none.
    """

    kind: str
    config: Mapping[str, Any]
    levels: Array

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """Of a scheduler whose timesteps are set."""
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        return cls(type(scheduler).__name__, config, _levels(scheduler))

    def other_settings(self, scheduler: Any) -> str | None:
        """What is different in a scheduler's class and settings, in words."""
        if (kind := type(scheduler).__name__) != self.kind:
            return f"the scheduler is a {kind}, not a {self.kind}"
        changed = [name for name, value in self.config.items() if scheduler.config.get(name, value) != value]
        return f"the scheduler has another {', '.join(changed)}" if changed else None

    def difference(self, scheduler: Any) -> str | None:
        """What is different in a scheduler at the start of a run, in words; ``None``: it takes the very same steps."""
        if (change := self.other_settings(scheduler)) is not None:
            return change
        steps = len(self.levels) - hasattr(scheduler, "sigmas")
        if len(scheduler.timesteps) != steps:
            return f"num_inference_steps is {len(scheduler.timesteps)}, not {steps}"
        levels = _levels(scheduler)
        if levels.shape != self.levels.shape or (off := np.abs(levels - self.levels)).max() > NOISE_LEVELS * max(
            1.0, levels.max()
        ):
            where = (
                ""
                if levels.shape != self.levels.shape
                else f" ({levels[off.argmax()]:.6g} at step {off.argmax()}, not {self.levels[off.argmax()]:.6g})"
            )
            return f"the scheduler's noise levels are others{where}"
        return None


def _levels(scheduler: Any) -> Array:
    levels = getattr(scheduler, "sigmas", None)
    return np.asarray((scheduler.timesteps if levels is None else levels).cpu(), np.float64)


def at_start(scheduler: Any) -> bool:
    """Are the timesteps of a scheduler set, and no step taken? ``False`` where it does not tell."""
    has_steps = getattr(scheduler, "num_inference_steps", None) is not None
    return has_steps and hasattr(scheduler, "step_index") and scheduler.step_index is None


@dataclass(frozen=True, eq=False)
class Form:
    """One size with one number of steps, for all lengths of texts.

    ``timesteps`` [T] are those that the pipeline's sampler hands over; the program may tell the model others. ``constants`` are
    inputs that are baked into the graphs. ``schedule``: ``None`` where it is not known. ``is_euler``: does the sampler need its
    newest output only? ``specs``: of latents and conditions with the longest texts, of ``settings.text_tokens``; there may be
    ``settings.shorter_texts`` besides. ``open(batch=B, text=L, start=step, branch=name)`` makes a stepper.
    """

    settings: Settings
    program: Program
    timesteps: Array
    constants: Mapping[str, Any]
    schedule: Schedule | None
    is_euler: bool
    specs: Mapping[str, TensorSpec]
    open: Callable[..., Stepper]

    @property
    def size(self) -> dict[str, Any]:
        """In words of the pipeline's call."""
        frames = {"num_frames": self.settings.frames} if self.settings.frames > 1 else {}
        return {"height": self.settings.height, "width": self.settings.width, **frames}

    def near(self, told: float, precision: float) -> list[int]:
        """The steps that ``told`` may be of, nearest first: none, one, or in bfloat16 a few."""
        distances = np.abs(self.timesteps - told)
        allowed = ROUNDING * max(1.0, abs(told)) + precision * np.abs(self.timesteps)
        return [int(step) for step in np.argsort(distances, kind="stable") if distances[step] <= allowed[step]]

    def strange(self, given: Mapping[str, Any]) -> list[str]:
        """Constants that are not handed over as they were baked in."""
        return [name for name, baked in self.constants.items() if not _is_same(given.get(name), baked)]


@dataclass(frozen=True, eq=False)
class Compiled:
    """All forms, the first the one that was asked for; and what knows how the pipeline's calls are read, a model without it.

    ``device``: PyTorch's name of that of the engines. ``origin``: the bundle that they come from, if any.
    """

    forms: Sequence[Form]
    model: LoadedModel
    device: str
    origin: Any = None

    def fitting(self, given: Mapping[str, Any], state: torch.Tensor) -> list[Form]:
        """The forms of the size that a call has.

        Raises:
            InputError: there is none; says what the call has and what there is.
        """
        latents = self.model.io.latents
        sized = [one for one in self.forms if tuple(state.shape[1:]) == tuple(one.specs[latents].shape[1:])]
        if fitting := [one for one in sized if not one.strange(given)]:
            return fitting
        form = (sized or self.forms)[0]
        strange = form.strange(given)
        if missing := [name for name in strange if given.get(name) is None]:
            raise InputError(f"{missing[0]} is missing: the transformer's pipeline hands it over at every call")
        got = self._sizes({name: given[name] for name in strange}) or {latents: list(state.shape[1:])}
        there = [self._sizes({name: one.constants[name] for name in strange}) or one.size for one in self.forms]
        if got in there:
            raise InputError(f"{', '.join(strange)} are not those that this pipeline was accelerated for: {_said(got)}")
        known = "; or ".join(dict.fromkeys(map(_said, there)))
        raise InputError(
            f"the call has {_said(got)}; this pipeline was accelerated for {known}: call it so, or {BACK} and accelerate it "
            "for the other size"
        )

    def _sizes(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in constants.items():
            if isinstance(value, torch.Tensor):
                found |= self.model.sizes_of(name, value)
            elif not isinstance(value, bool):
                found[name] = value
        return found


def _said(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def is_empty(value: Any) -> bool:
    """Does an argument say nothing?"""
    return value is None or (isinstance(value, Mapping) and all(map(is_empty, value.values())))


def _is_same(value: Any, baked: Any) -> bool:
    """Is ``value`` what was baked in? It may be there once for each sample."""
    if isinstance(baked, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            return False
        value = value[0] if value.ndim == baked.ndim + 1 else value  # as older pipelines do
        shape = baked.shape if baked.shape[:1] != (1,) else (*value.shape[:1], *baked.shape[1:])
        return value.shape == shape and bool((value.to(baked.device, baked.dtype) == baked).all())
    if isinstance(baked, list | tuple) and len(baked) == 1 and isinstance(value, list | tuple):
        return bool(value) and all(_is_plainly_same(one, baked[0]) for one in value)
    return _is_plainly_same(value, baked)


def _is_plainly_same(value: Any, baked: Any) -> bool:
    if isinstance(baked, list | tuple) and isinstance(value, list | tuple):
        return len(value) == len(baked) and all(map(_is_plainly_same, value, baked))
    return type(value) is type(baked) and bool(value == baked)
