"""One call of a transformer, looked at from all sides before anything believes it. ``B`` batch."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachec.compiler.drop_in.forms import Compiled, Form, is_empty
from cachec.compiler.stand_in import BACK
from cachec.runtime.errors import InputError
from cachec.runtime.specs import TensorSpec
from cachec.runtime.texts import masked_length, shortest_text


@dataclass(frozen=True, eq=False)
class Asked:
    """A call as the graphs take it: ``latents`` [B, …] and ``conditions``; ``told`` the time, good to ``precision``, relative.

    ``given`` by name, as the transformer takes it. ``made`` are objects among it that a pipeline makes once a run, or at least
    does not make at every step. ``forms``: those of this size. ``text``: the length that texts were brought to.
    """

    given: Mapping[str, Any]
    forms: list[Form]
    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    told: float
    precision: float
    made: tuple[Any, ...]
    context: str | None
    text: int

    @property
    def batch(self) -> int:
        return len(self.latents)


class Reader:
    """Reads calls of ``original``, of which ``compiled`` was made.

    ``B`` may be any that the engines take.
    """

    def __init__(self, original: Any, compiled: Compiled) -> None:
        self._signature = inspect.signature(original.forward)
        self._compiled = compiled

    def read(self, args: tuple[Any, ...], keywords: Mapping[str, Any], context: str | None, *, wants_gradients: bool) -> Asked:
        """A call with these arguments.

        Raises:
            InputError: something is not as it was compiled; names it.
        """
        model = self._compiled.model
        given = self._bind(args, keywords)
        if missing := [name for name in (model.io.latents, model.io.timestep) if name not in given]:
            raise InputError(f"{missing[0]} is missing")
        state, told = model.state(given), given[model.io.timestep]
        self._check_tensors({model.io.latents: state, model.io.timestep: told}, wants_gradients=wants_gradients)
        forms = self._compiled.fitting(given, state)
        conditions, text = self._conditions(given, forms[0], len(state))
        self._check_tensors(conditions, wants_gradients=wants_gradients)
        self._check_places({model.io.latents: state, **conditions})
        time = told.reshape(-1)
        if not bool((time == time[0]).all()):
            raise InputError(f"the timesteps of one call differ: {', '.join(f'{float(one):.4g}' for one in time)}")
        floats = [one.dtype for one in (told, state) if one.is_floating_point()] or [torch.float32]
        return Asked(
            given=given,
            forms=forms,
            latents=state.float(),
            conditions=conditions,
            told=float(time[0]),
            precision=max(torch.finfo(dtype).eps for dtype in floats),
            made=_made(given, set(forms[0].constants), {model.io.latents, model.io.timestep}),
            context=context,
            text=text,
        )

    def _bind(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, as the original takes them; those that it takes and this does not are refused unless empty."""
        try:
            bound = self._signature.bind(*args, **keywords)
        except TypeError as error:
            raise InputError(f"the transformer does not take this call: {error}") from error
        bound.apply_defaults()
        model, form = self._compiled.model, self._compiled.forms[0]
        io = model.io
        taken = {io.latents, io.timestep, *io.conditions, *form.constants, "return_dict"}
        strange = []
        for name, value in bound.arguments.items():
            if name in taken or is_empty(value) or value is self._signature.parameters[name].default:
                continue
            if model.says_nothing(name, value):
                continue
            strange.append(f"{name} ({', '.join(map(str, value))})" if isinstance(value, Mapping) else name)
        if strange:
            raise InputError(
                f"the accelerated transformer does not take {', '.join(sorted(strange))}: take it off the call, or {BACK}"
            )
        return {name: value for name, value in bound.arguments.items() if not is_empty(value)}

    def _conditions(self, given: Mapping[str, Any], form: Form, batch: int) -> tuple[dict[str, torch.Tensor], int]:
        """As the graphs take them: in their types, and of the shortest compiled length that holds the text; and that."""
        model = self._compiled.model
        try:
            taken = model.taken(given, form.settings)
        except KeyError as error:
            raise InputError(f"{error.args[0]} is missing: the transformer was compiled with it") from error
        fitted = {name: _fit(name, taken, given.get(name), form.specs[name], batch) for name in model.io.conditions}
        if not form.settings.shorter_texts or model.io.text is None:
            return fitted, form.settings.text_tokens
        needed = masked_length((fitted[model.io.text[1]] != 0).cpu().numpy())
        length = shortest_text((*form.settings.shorter_texts, form.settings.text_tokens), needed)
        return {name: value[:, :length] if name in model.io.text else value for name, value in fitted.items()}, length

    def _check_tensors(self, tensors: Mapping[str, Any], *, wants_gradients: bool) -> None:
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise InputError(f"{name} is {type(value).__name__}; the accelerated transformer takes a tensor")
            if value.is_complex():
                raise InputError(f"{name} is {value.dtype}; the accelerated transformer takes real numbers")
        if wants_gradients and (strange := [name for name, value in tensors.items() if value.requires_grad]):
            raise InputError(f"{', '.join(strange)} want gradients, and an accelerated transformer gives none: {BACK}")

    def _check_places(self, tensors: Mapping[str, torch.Tensor]) -> None:
        device = torch.device(self._compiled.device)
        if strange := [name for name, value in tensors.items() if value.device != device]:
            raise InputError(
                f"{', '.join(strange)} are not on {device}, where this pipeline was accelerated: move it back, or {BACK} "
                "and accelerate it again"
            )
        if not bool(torch.stack([value.isfinite().all() for value in tensors.values()]).all()):
            strange = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
            raise InputError(f"{', '.join(strange)} hold NaN or infinity: look at what made or edited them")


def _made(given: Mapping[str, Any], constants: set[str], moving: set[str]) -> tuple[Any, ...]:
    """Constants that are objects, which pipelines make anew for each run; where there are none, the conditions."""
    own = [one for name, value in given.items() if name in constants for one in _objects(value)]
    return tuple(own or [one for name, value in given.items() if name not in moving for one in _objects(value)])


def _objects(value: Any) -> list[Any]:
    """Tensors and lists, and what such lists hold: these may be made anew, and hold the same."""
    if isinstance(value, list):
        return [value, *(one for one in value if isinstance(one, torch.Tensor))]
    return [value] if isinstance(value, torch.Tensor) else []


def _fit(name: str, taken: Mapping[str, Any], given: Any, spec: TensorSpec, batch: int) -> torch.Tensor:
    """A condition in the type of the graphs.

    Raises:
        InputError: it is of another shape, or text was cut off.
    """
    value = taken[name]
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is {type(value).__name__}; the accelerated transformer takes a tensor")
    wanted = (batch, *spec.shape[1:])
    if tuple(value.shape) != wanted:
        length = (
            f": a text of {value.shape[1]} tokens, where {wanted[1]} were compiled" if value.ndim == len(wanted) == 3 else ""
        )
        raise InputError(f"{name} is {list(value.shape)}, expected {list(wanted)}{length}")
    if value.ndim > 1 and (lost := _lost(given, value, masked=any(one.dtype == torch.bool for one in taken.values()))):
        raise InputError(f"{name} has {lost} tokens, and {wanted[1]} were compiled: shorten the prompt, or compile with more")
    return value.to(getattr(torch, spec.dtype))


def _lost(given: Any, value: torch.Tensor, *, masked: bool) -> int:
    """How long a text was of which something was cut off [B, L, …]; 0: nothing was, or only padding."""
    length = value.shape[1]
    if isinstance(given, list):
        longest = max((len(one) for one in given if isinstance(one, torch.Tensor)), default=0)
        return longest if longest > length else 0
    if not isinstance(given, torch.Tensor) or given.ndim != value.ndim or given.shape[1] <= length:
        return 0
    is_padding = masked and (value.dtype != torch.bool or not given[:, length:].any())  # then its mask tells
    return 0 if is_padding else int(given.shape[1])
