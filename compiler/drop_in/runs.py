"""Whose call is this? One run of a sampler at a time, its branches of guidance apart, each with slots of its own.

Where it is not certain that a call goes on with what was computed before, it begins anew: that costs computed steps, and is
never wrong. ``B`` batch.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from cachec.compiler.drop_in.asked import Asked
from cachec.compiler.drop_in.forms import Form
from cachec.runtime.abi import NEGATIVE, POSITIVE
from cachec.runtime.program import Program
from cachec.runtime.stepper import Stepper

log = logging.getLogger(__name__)

Key = str | int  # a branch: its cache context, or which call it is at each time
CONTEXTS = {"cond": POSITIVE, "uncond": NEGATIVE, "pred_cond": POSITIVE, "pred_uncond": NEGATIVE}  # of branches of guidance


@dataclass(eq=False)
class Branch:
    """One branch of guidance, or the whole of a run without: ``conditions`` are those in use, ``step`` the last one answered.

    ``made``: objects of its last call (``Asked.made``). ``text``: the length of texts that its stepper takes.
    """

    stepper: Stepper
    text: int
    conditions: Mapping[str, torch.Tensor]
    made: tuple[Any, ...]
    step: int | None = None

    def has(self, asked: Asked) -> bool:
        """Are these the conditions of the call?"""
        return all(torch.equal(value, self.conditions[name]) for name, value in asked.conditions.items())

    def shares(self, asked: Asked) -> bool:
        """Was an object of the call in the last one?"""
        return any(one is other for one in asked.made for other in self.made)


@dataclass(eq=False)
class Run:
    """One run: ``told`` is the time that it is at, and ``latents`` what its branches got there.

    ``off``: why its times are not those of the program, so that every step is computed; ``None``: they are, as far as known.
    ``fresh``: is ``first`` certainly the time that its sampler begins at?
    """

    form: Form
    batch: int
    off: str | None
    fresh: bool
    first: float
    told: float
    latents: torch.Tensor
    branches: dict[Key, Branch] = field(default_factory=dict)
    answered: set[Key] = field(default_factory=set)  # at this time
    looked_at: set[str] = field(default_factory=set)  # compute graphs whose transformer was compared with what it was
    warned: bool = False

    @classmethod
    def begun(cls, form: Form, off: str | None, asked: Asked, *, at_start: bool) -> "Run":
        return cls(form, asked.batch, off, at_start, asked.told, asked.told, asked.latents.clone())

    def goes_on(self, asked: Asked, *, at_start: bool) -> bool:
        """Is the call certainly one of this run? ``at_start``: the pipeline's scheduler is at the start of a run."""
        if self.form not in asked.forms or self.latents.shape != asked.latents.shape:
            return False
        if asked.told == self.told:  # branches of one step get the same latents
            return self.key_of(asked) is not None and torch.equal(self.latents, asked.latents)
        if at_start or not self._is_later(asked):
            return False
        return any(branch.shares(asked) for branch in self.branches.values())

    def _is_later(self, asked: Asked) -> bool:
        """No step is taken twice, and none backward."""
        near, last = self.near(asked), max((-1 if one.step is None else one.step for one in self.branches.values()), default=-1)
        return not near or max(near) > last

    def key_of(self, asked: Asked) -> Key | None:
        """The branch, which may be a new one; ``None``: a branch that has been answered at this time already.

        Without a context it is the one with these conditions; if none has them, the first that was not asked yet.
        """
        answered = self.answered if asked.told == self.told else set()
        if asked.context is not None:
            return None if asked.context in answered else asked.context
        numbered = {key: branch for key, branch in self.branches.items() if isinstance(key, int)}
        fitting = [key for key, branch in numbered.items() if branch.has(asked)]
        free = [key for key in numbered if key not in answered]
        if fitting:
            return next((key for key in fitting if key in free), None)
        return free[0] if free else len(numbered)

    def near(self, asked: Asked) -> list[int]:
        """The steps that the call may be of."""
        return [] if self.off is not None else self.form.near(asked.told, asked.precision)

    def answer(self, asked: Asked, graph: str, open_stepper: Callable[..., Stepper]) -> torch.Tensor:
        """The velocity [B, …] for a call of this run, of the transformer whose compute graph is ``graph``."""
        if asked.told != self.told:
            self.told, self.latents, self.answered = asked.told, asked.latents.clone(), set()
        key = self.key_of(asked)
        assert key is not None, "a call that goes on is of a branch"
        branch = self.branches.get(key)
        step = self._step(asked, branch)
        if branch is None or not branch.has(asked) or (step is not None and step != branch.stepper.next_step):
            stepper = None if branch is None or branch.text != asked.text else branch.stepper
            if stepper is None:
                number = len(self.branches) if branch is None else list(self.branches).index(key)
                begins = self.fresh and branch is None and asked.told == self.first
                start, name = self._start(step if begins else None), CONTEXTS.get(asked.context or "")
                stepper = open_stepper(self.form, self.batch, number, asked.text, start, name)
            stepper.begin(
                _there(asked.conditions, stepper), first=step
            )  # what was computed for other conditions is not looked at any more
            branch = self.branches[key] = Branch(stepper, asked.text, _cloned(asked.conditions), ())
            self._check_alone(step)
        (latents,) = _there({"latents": asked.latents}, branch.stepper).values()
        if step is None or self.off is not None or not _is_computed_by(branch.stepper.program, step, graph):
            self._warn(asked)
            velocity = branch.stepper.compute(asked.told, latents, graph=graph)
        else:
            velocity = branch.stepper.velocity(step, latents, told=float(self.form.timesteps[step]), graph=graph)
        branch.step, branch.made = branch.step if step is None else step, asked.made
        self.answered.add(key)
        return velocity if isinstance(velocity, torch.Tensor) else _from(velocity)

    def _step(self, asked: Asked, branch: Branch | None) -> int | None:
        """The step that is due, if the call may be of it; else the nearest; ``None`` if it is of none."""
        near, due = self.near(asked), None if branch is None else branch.stepper.next_step
        start = self.form.program.key.start_step
        if due in near:
            return due
        return next((step for step in near if step >= start), None)

    def _start(self, step: int | None) -> int:
        """Where the program is to begin for a sampler that begins at ``step``: there, if it has numbers for that."""
        program = self.form.program
        return step if step is not None and step in program.starts else program.key.start_step

    def _check_alone(self, step: int | None) -> None:
        """Where a sampler of several outputs is given the mean of a gap, it must have been given those of all gaps before."""
        program = self.form.program
        if step not in (None, program.key.start_step) and program.rows_out is not None and not self.form.is_euler:
            self.off = f"the run begins, or goes on with other conditions, at step {step}"

    def _warn(self, asked: Asked) -> None:
        if self.warned:
            return
        self.warned = True
        steps = self.form.program.num_steps
        why = self.off or f"time {asked.told:.6g} is none of the {steps} steps that this pipeline was accelerated for"
        log.warning("%s: such steps are computed, as by the untouched pipeline. Accelerate for them to save time", why)


@dataclass(eq=False)
class Runs:
    """The run that goes on, and the steppers of runs so far, which are used again: what a pipeline's transformers share."""

    run: Run | None = None
    steppers: dict[tuple[Form, int, int, int, str | None], Stepper] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, form: Form, batch: int, number: int, text: int, start: int, branch: str | None) -> Stepper:
        """The stepper of a run's branch of this ``number``, with texts of this length; one that begins elsewhere makes way.

        ``branch``: of guidance, if the pipeline says so. Raises ``InputError`` where that must be known, and is not.
        """
        key = form, batch, number, text, branch if form.program.has_branches else None
        if key in self.steppers and self.steppers[key].program.key.start_step != start:
            del self.steppers[key]
        if key not in self.steppers:
            self.steppers[key] = form.open(batch=batch, text=text, start=start, branch=branch)
        return self.steppers[key]


def _is_computed_by(program: Program, step: int, graph: str) -> bool:
    """Is the step left to the program, or computed by this compute graph?"""
    return all(one.graph == graph for one in program.instructions if one.computes and step in one.steps)


def _cloned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in tensors.items()}


def _there(tensors: Mapping[str, torch.Tensor], stepper: Stepper) -> dict[str, Any]:
    """Tensors as the engines' library takes them: as they are on a GPU, as numpy arrays where it has these on the CPU."""
    on_host = not any(stepper.takes(tensor) or tensor.is_cuda for tensor in tensors.values())
    return {name: tensor.contiguous().numpy() if on_host else tensor.contiguous() for name, tensor in tensors.items()}


def _from(buffer: Any) -> torch.Tensor:
    """A buffer of another library as a tensor, on the same memory."""
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else from_dlpack(buffer)
