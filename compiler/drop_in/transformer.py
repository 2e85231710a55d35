"""The transformer of an accelerated pipeline. It believes nothing: each call says where the run is.

What differs from what was compiled, or from what the run began with, is computed where engines can, and else refused in that
call, in words of the pipeline's user. ``B`` batch.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from cachec.compiler.drop_in.asked import Asked, Reader
from cachec.compiler.drop_in.forms import Compiled, Form, at_start
from cachec.compiler.drop_in.runs import Run, Runs
from cachec.compiler.fingerprint import Fingerprint
from cachec.compiler.stand_in import BACK, StandIn
from cachec.engines.torch_device import neutral_modes
from cachec.runtime.abi import COMPUTE
from cachec.runtime.errors import EngineError, InputError

log = logging.getLogger(__name__)


class AcceleratedTransformer(StandIn):
    """Answers calls from engines and Programs. ``original``: what stood there. ``pipeline``: whose scheduler is looked at.

    Where a pipeline has two transformers, each has a ``graph`` that computes it, and they share their ``runs``.

    Not thread-safe: calls at the same time are refused. A refusal ends the run; the next one starts as if it had not been.
    """

    def __init__(
        self, original: nn.Module, pipeline: Any, compiled: Compiled, *, graph: str = COMPUTE, runs: Runs | None = None
    ) -> None:
        super().__init__(original)
        self._compiled = compiled
        self._pipeline: Callable[[], Any] = (lambda: None) if pipeline is None else weakref.ref(pipeline)
        self._reader = Reader(original, compiled)
        self._dtype = next(original.parameters()).dtype
        self._fingerprint = Fingerprint.of(original)
        self._graph, self._runs = graph, runs or Runs()
        self._context: str | None = None
        self._steps: int | None = None  # as a context says

    def beside(self, original: nn.Module, graph: str) -> "AcceleratedTransformer":
        """What stands in the place of the pipeline's other transformer, and shares this one's runs."""
        return AcceleratedTransformer(original, self._pipeline(), self._compiled, graph=graph, runs=self._runs)

    def plays(self, origin: Any) -> bool:
        """Does it play the bundle that was opened as ``origin``?"""
        return origin is not None and self._compiled.origin is origin

    @property
    def program(self) -> Any:
        """The Program of the size and number of steps that were asked for first."""
        return self._compiled.forms[0].program

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **keywords: Any) -> Any:
        """The velocity at the ``timestep`` that is handed in, from the transformer's usual arguments.

        Raises:
            InputError: something is not as it was compiled.
            EngineError: the velocity is not finite.
        """
        if not self._runs.lock.acquire(blocking=False):
            raise InputError(
                "the accelerated transformer is in a call already, from another thread: it has the state of one run; "
                "accelerate a pipeline for each thread, or let one wait for the other"
            )
        try:
            wants_gradients = torch.is_grad_enabled()
            with neutral_modes(self._compiled.device), torch.no_grad():
                asked = self._reader.read(args, keywords, self._context, wants_gradients=wants_gradients)
                return self._answer(asked)
        except BaseException:
            self._runs.run = None  # no later step goes on from what failed
            raise
        finally:
            self._runs.lock.release()

    def _answer(self, asked: Asked) -> Any:
        scheduler = self._scheduler()
        run = self._runs.run
        begins = scheduler is not None and at_start(scheduler)
        if run is None or not run.goes_on(asked, at_start=begins):
            run = self._runs.run = Run.begun(*self._choose(asked, scheduler), asked, at_start=begins)
        self._check_weights(run)
        try:
            velocity = run.answer(asked, self._graph, self._runs.open)
        except EngineError as error:
            raise EngineError(f"accelerated in {str(self._dtype).removeprefix('torch.')}: {error}") from error
        answer = self._compiled.model.answer(velocity.to(self._dtype_of(asked)), asked.given)
        return Transformer2DModelOutput(sample=answer) if asked.given.get("return_dict", True) else (answer,)

    def _dtype_of(self, asked: Asked) -> torch.dtype:
        return self._compiled.model.state(asked.given).dtype

    def _check_weights(self, run: Run) -> None:
        """All that is known of them at the first call of a run, and at later ones what takes no time."""
        if self._graph not in run.looked_at and (change := self._fingerprint.change(self.original)) is not None:
            raise InputError(
                f"{change} since this pipeline was accelerated. What was compiled from it would not follow, or only in part: "
                f"{BACK}, make it as it shall be, and accelerate it again"
            )
        if not self._fingerprint.is_untouched:
            raise InputError(f"weights were changed in place in the middle of a run: {BACK}, and accelerate it again")
        run.looked_at.add(self._graph)

    def _choose(self, asked: Asked, scheduler: Any) -> tuple[Form, str | None]:
        """The form whose steps the run takes, as far as its scheduler tells, and why none is."""
        if scheduler is None or getattr(scheduler, "num_inference_steps", None) is None:
            known = False
        else:
            known = getattr(scheduler, "step_index", None) is None
        if not known:
            of_steps = [form for form in asked.forms if form.program.num_steps == self._steps] or asked.forms
            fitting = [form for form in of_steps if form.near(asked.told, asked.precision)]
            return (fitting or of_steps)[0], None
        self._compiled.model.check_scheduler(scheduler)
        differences = [None if one.schedule is None else one.schedule.difference(scheduler) for one in asked.forms]
        same = [form for form, difference in zip(asked.forms, differences, strict=True) if difference is None]
        return (same[0], None) if same else (asked.forms[0], differences[0])

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline that was accelerated, if this still stands in it."""
        pipeline = self._pipeline()
        return pipeline.scheduler if pipeline is not None and any(one is self for one in vars(pipeline).values()) else None

    @contextmanager
    def cache_context(self, name: str, *, num_inference_steps: int | None = None, **_details: Any) -> Iterator[None]:
        """Which branch of guidance the calls inside are of, and in how many steps."""
        before, (self._context, self._steps) = (self._context, self._steps), (name, num_inference_steps)
        try:
            yield
        finally:
            self._context, self._steps = before

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Pipelines call it when they are done."""
        self._runs.run = None
