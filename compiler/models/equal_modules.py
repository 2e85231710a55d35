"""Modules that compute what a transformer of diffusers computes, in operators that ``torch.export`` takes.

They share its parameters under the same names: weights of a model on disk are found by them, and blocks by their paths.
"""

import copy
from typing import Any

from torch import nn

HELD = ("_parameters", "_buffers", "_modules")


class EqualModule(nn.Module):
    """Has the parameters, buffers and children of ``original``, under their names; ``forward`` is its own.

    What is set on one is not set on the other.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _share(self, original)

    def __getattr__(self, name: str) -> Any:  # children are of types that only the original knows
        return super().__getattr__(name)


def with_child(module: nn.Module, name: str, child: nn.Module) -> Any:
    """What ``module`` is, but for one of its children; the given module stays as it is."""
    twin = copy.copy(module)
    _share(twin, module)
    setattr(twin, name, child)
    return twin


def _share(module: nn.Module, original: nn.Module) -> None:
    for held in HELD:
        module.__dict__[held] = dict(getattr(original, held))
