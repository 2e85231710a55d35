"""What a module was when it was compiled, compared with what it is now.

Seen: modules, attention processors and hooks that were exchanged or added; every plain setting; parameters and buffers of
another place, shape or type; changes in place that PyTorch counts, and those past its count (``weight.data += …``) if they
touch one of some 64 elements of each tensor, spread evenly. Not seen: a change of single elements between these past the
count, and methods that were replaced on a class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NUM_SAMPLES = 64
_PLUMBING = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}  # what every module has for itself
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """``facts`` by what they are about; ``samples`` [N] float64, some elements of all tensors.

    ``counts`` of the ``tensors`` that there were: where they lie, and how often they were changed in place.
    """

    facts: Mapping[str, Any]
    samples: torch.Tensor
    tensors: Sequence[torch.Tensor]
    counts: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, module: nn.Module) -> "Fingerprint":
        every = [tensor for part in module.modules() for _, tensor in _tensors(part)]
        counted = [tensor for tensor in every if not tensor.is_inference()]
        return cls(dict(_facts(module)), _samples(module), counted, _counts(counted))

    @property
    def is_untouched(self) -> bool:
        """Are the tensors that there were where they were, and not changed in place? For every call: it takes microseconds."""
        return _counts(self.tensors) == self.counts

    def change(self, module: nn.Module) -> str | None:
        """What is different now, in words; ``None`` if nothing is."""
        facts = dict(_facts(module))
        for name in (*self.facts, *(name for name in facts if name not in self.facts)):
            if self.facts.get(name) != facts.get(name):
                return _in_words(name, self.facts.get(name), facts.get(name))
        samples = _samples(module)
        if torch.equal(samples.view(torch.int64), self.samples.view(torch.int64)):  # as bits: NaN equals itself
            return None
        return "values of the weights were changed in place"


class _Same:
    """An object that is equal to itself only; kept, so that no other one can get its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _counts(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _facts(root: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in root.named_modules():
        place = path or "the transformer"
        yield place, _Same(module)
        for name, value in vars(module).items():
            if name == "_diffusers_hook":  # of caches, casting, offloading: a registry that may be empty
                yield f"{place}.{name}", _frozen(value.hooks or None)
            elif name not in _PLUMBING:
                yield f"{place}.{name}", _frozen(value)
        for name, tensor in _tensors(module):
            yield f"{place}.{name}", _tensor_facts(tensor)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    both = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in both if tensor is not None]


def _tensor_facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version  # those of inference mode are not counted
    return tensor.data_ptr(), version, tensor.shape, tensor.dtype, tensor.device


def _frozen(value: Any) -> Any:
    """Something to compare with: settings by value, tensors by their facts, everything else by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _tensor_facts(value)
    if isinstance(value, Mapping):
        return {_frozen_key(key): _frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return _Same(value)


def _frozen_key(key: Any) -> Any:
    return key if isinstance(key, _PLAIN) else id(key)


def _samples(root: nn.Module) -> torch.Tensor:
    parts = []
    for module in root.modules():
        for _, tensor in _tensors(module):
            flat = tensor.detach().reshape(-1)
            stride = max(1, flat.numel() // NUM_SAMPLES) | 1  # odd: no column of a matrix alone
            parts.append(flat[::stride].double())
    return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.empty(0, dtype=torch.float64)


def _in_words(name: str, before: Any, now: Any) -> str:
    if before is None or now is None:
        return f"{name} was {'added' if before is None else 'taken away'}"
    if isinstance(before, _Same) and isinstance(now, _Same):
        return f"{name} was exchanged ({type(before.value).__name__} for {type(now.value).__name__})"
    if isinstance(before, tuple) and isinstance(now, tuple) and before[2:] == now[2:] and len(before) == 5:
        return f"{name} was changed{' in place' if before[0] == now[0] else ''}"
    return f"{name} was changed"
