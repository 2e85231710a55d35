"""What stands where a module was: nothing that would have no effect passes without a word. The part without the maths."""

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from cachec.runtime.errors import InputError

BACK = "set pipe.transformer = pipe.transformer.original"  # the way out of everything
READS = ("active_adapters", "get_memory_footprint", "num_parameters")  # methods of the original that only look
MOVES = ("to", "cuda", "half", "float")  # all of them end in ``_apply``


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_keywords: Any) -> NoReturn:
        raise InputError(
            f"{name}() has no effect on an accelerated transformer, which runs what was compiled: {BACK}, call it there, and "
            "accelerate it again"
        )

    return refuse


class StandIn(ModelMixin):  # type: ignore[misc]
    """What was there is ``original``, whose attributes can be read from this one.

    A ``ModelMixin`` because pipelines hand calls on to these only (``pipe.set_adapters``): here they are refused, not lost.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original; its methods, unless they only look, are refused when they are called."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__:
                raise
        value = getattr(super().__getattr__("original"), name)
        is_method = isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)
        return _refusal(name) if is_method and name not in READS else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses what belongs on the original: here it would have no effect."""
        original = self.__dict__.get("_modules", {}).get("original")
        if original is not None and name not in vars(self) and name != "original":
            belongs = (vars(original), original._modules, original._parameters, original._buffers)
            if any(name in some for some in belongs):
                raise InputError(f"{name} of an accelerated transformer cannot be set: {BACK}, set it, and accelerate it again")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``to``, ``half``, ``cuda`` and the like end here: they may ask for what is so already."""
        for parameter in self.original.parameters(recurse):
            probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            wanted = fn(probe)
            if (wanted.dtype, wanted.device) != (probe.dtype, probe.device):
                raise InputError(
                    f"an accelerated transformer stays {probe.dtype} on {probe.device} and cannot go to {wanted.dtype} on "
                    f"{wanted.device}: {BACK}, move the pipeline, and accelerate it again"
                )
        return self

    def train(self, mode: bool = True) -> Self:
        """As what was compiled, it is in evaluation mode for good."""
        if mode:
            _refusal("train")()
        return self

    load_state_dict: Any = _refusal("load_state_dict")
    compile: Any = _refusal("compile")

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        return self.original.state_dict(*args, **keywords)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise InputError(
            f"an accelerated transformer cannot be pickled or copied: its engines live in this process. {BACK} before, and "
            "accelerate the copy"
        )


for _name, _value in vars(ModelMixin).items():
    if callable(_value) and not _name.startswith("_") and _name not in (*READS, *MOVES):
        setattr(StandIn, _name, _refusal(_name))
