"""Small things that families make of inputs and outputs. ``B`` batch, ``L`` tokens, ``D`` channels."""

from typing import Any

import torch


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own; floating-point numbers are float32, labels and masks keep their types."""
    copied = tensor.detach().contiguous().clone()
    return copied.float() if copied.is_floating_point() else copied


def ragged_mask(states: torch.Tensor) -> torch.Tensor:
    """An example of a mask for texts [B, L, D]: no two of them equally long, all with padding; int64, as tokenizers have it."""
    length = states.shape[1]
    lengths = [max(1, length - 1 - sample) for sample in range(len(states))]
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def without_variance(config: Any) -> tuple[int, int] | None:
    """The channels of the output that sampling takes: the first half, of a network that gives a variance besides."""
    given, made = config.get("in_channels"), config.get("out_channels")
    return (0, given) if given is not None and made == 2 * given else None
