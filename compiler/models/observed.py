"""What a pipeline hands its transformer: its own ``__call__`` runs with a spy in its place, and nothing is computed.

``B`` batch, ``T`` steps.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from cachec.runtime.abi import COMPUTE, EXPERT
from cachec.runtime.errors import InputError, in_one_line

TRANSFORMER = "transformer"  # its name in the pipeline, and its folder; of two it is the one that begins
STATEFUL = ("scheduler", "guider")  # components that a run changes: it gets copies


@dataclass(frozen=True, eq=False)
class Call:
    """One call: at which step, of which part of the pipeline, under which ``cache_context``, and what it got, by name.

    Positional arguments have the names that the transformer gives them. What is ``None`` or an empty dictionary is left out.
    """

    step: int
    part: str
    context: str | None
    given: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Observed:
    """The calls of a run, in order, and the scheduler that the run used: its timesteps are set, and no step was taken."""

    calls: tuple[Call, ...]
    scheduler: Any

    @property
    def first(self) -> Mapping[str, Any]:
        """What the first call got."""
        return self.calls[0].given

    @property
    def graphs(self) -> tuple[str, ...] | None:
        """By step the compute graph of the transformer that was called first; ``None``: it was the same at all steps."""
        by_step = {call.step: call.part for call in reversed(self.calls)}
        graphs = tuple(COMPUTE if by_step[step] == TRANSFORMER else EXPERT for step in sorted(by_step))
        return None if {*graphs} == {COMPUTE} else graphs

    def at_each_step(self, name: str) -> tuple[Any, ...]:
        """What the first call of every step got as ``name``."""
        by_step: dict[int, Any] = {}
        for call in self.calls:
            by_step.setdefault(call.step, call.given[name])
        return tuple(by_step.values())

    def told(self, name: str) -> torch.Tensor:
        """What the transformer is told at each step as ``name`` [T], the time; float32, on the CPU."""
        return torch.stack([value.reshape(-1)[0].float().cpu() for value in self.at_each_step(name)])


def observe(
    pipeline: Any,
    parts: Mapping[str, nn.Module],
    given: Mapping[str, Any],
    *,
    device: torch.device | None = None,
    whole: bool = True,
) -> Observed:
    """Run ``pipeline(**given)`` with spies in place of ``parts``, which may be without values; the pipeline stays as it is.

    The spies say that they are float32 and on ``device``. The latents stay what they were before the first step, and
    the run ends behind the last step, or behind the first if not ``whole``.

    Raises:
        InputError: the pipeline refuses the call, in its words; or it never calls its transformer.
    """
    run = _Run(whole)
    twin = _with_spies(pipeline, parts, device, run)
    try:
        with torch.no_grad():
            twin(**{"output_type": "latent", **given})
    except _Done:
        pass
    except ValueError as error:
        raise InputError(f"{type(pipeline).__name__} does not take this call: {in_one_line(error)}") from error
    if not run.calls:
        raise InputError(f"{type(pipeline).__name__} never called its {' or '.join(parts)}")
    del twin.scheduler.step
    return Observed(tuple(run.calls), twin.scheduler)


def let_through(pipeline: Any, parts: Mapping[str, nn.Module], given: Mapping[str, Any], device: torch.device) -> Any:
    """What ``pipeline(**given)`` makes of the latents that it is given, as if its transformer had left them alone.

    So a pipeline decodes latents by its own code; ``parts`` are never called.
    """
    with torch.no_grad():
        return _with_spies(pipeline, parts, device, _Run(whole=True, ends=False))(**given, return_dict=False)[0]


def _with_spies(pipeline: Any, parts: Mapping[str, nn.Module], device: torch.device | None, run: "_Run") -> Any:
    """A copy that shares the modules, and nothing that a run writes to."""
    twin = copy.copy(pipeline)
    own = vars(twin)
    own.update({name: copy.deepcopy(own[name]) for name in STATEFUL if own.get(name) is not None})
    own.update({name: _Spy(name, module, device or torch.device("cpu"), run) for name, module in parts.items()})
    own["_progress_bar_config"] = {"disable": True}
    twin.scheduler.step = run.step_of(twin.scheduler)
    return twin


class _Done(Exception):  # noqa: N818 (nothing is wrong)
    """Enough was seen."""


@dataclass(eq=False)
class _Run:
    """What was seen so far."""

    whole: bool
    ends: bool = True  # by an exception
    calls: list[Call] = field(default_factory=list)
    steps: int = 0
    context: str | None = None

    def step_of(self, scheduler: Any) -> Any:
        """A scheduler's ``step`` that leaves the latents alone."""

        def step(_output: Any, _timestep: Any, sample: Any, *_args: Any, return_dict: bool = True, **_options: Any) -> Any:
            self.steps += 1
            if self.ends and (not self.whole or self.steps == len(scheduler.timesteps)):
                raise _Done
            return SimpleNamespace(prev_sample=sample) if return_dict else (sample,)

        return step


class _Spy(nn.Module):
    """Looks like a transformer, writes down what it is called with, and answers zeros."""

    def __init__(self, part: str, module: nn.Module, device: torch.device, run: _Run) -> None:
        super().__init__()
        self.device, self.dtype = device, torch.float32
        vars(self).update(_part=part, _seen=module, _run=run)  # not as a child: its parameters are not this one's
        self._signature = inspect.signature(module.forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_seen"], name)

    def forward(self, *args: Any, **keywords: Any) -> Any:
        bound = self._signature.bind(*args, **keywords).arguments
        extra = bound.pop("kwargs", {})
        given = {name: value for name, value in {**bound, **extra}.items() if not _is_empty(value)}
        self._run.calls.append(Call(self._run.steps, self._part, self._run.context, given))
        latents = next(iter(bound.values()))
        zeros = [torch.zeros_like(one) for one in latents] if isinstance(latents, list) else self._zeros(latents)
        return Transformer2DModelOutput(sample=zeros) if given.get("return_dict", True) else (zeros,)

    def _zeros(self, latents: torch.Tensor) -> torch.Tensor:
        """As many channels as the transformer gives: pipelines split what comes with a variance."""
        channels = self.config.get("out_channels") if latents.ndim > 3 else None  # tokens have them last, and no variance
        return latents.new_zeros(len(latents), channels or latents.shape[1], *latents.shape[2:])

    @contextmanager
    def cache_context(self, name: str, **_details: Any) -> Iterator[None]:
        before, self._run.context = self._run.context, name
        try:
            yield
        finally:
            self._run.context = before


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)
