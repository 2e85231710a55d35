"""Small things that families make of inputs and outputs. ``B`` batch, ``L`` tokens, ``D`` channels."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cachec.compiler.models.base import UNGUIDED, LoadedModel, Settings
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own; floating-point numbers are float32, labels and masks keep their types."""
    copied = tensor.detach().contiguous().clone()
    return copied.float() if copied.is_floating_point() else copied


def as_the_weights(value: Array, like: torch.Tensor) -> torch.Tensor:
    """Where the weights ``like`` are, and of their type if it is floating-point."""
    given = torch.from_numpy(value).to(like.device)
    return given.to(like.dtype) if given.is_floating_point() else given


def own_levels(pipeline: Any, sigmas: Sequence[float] | None) -> dict[str, Any]:
    """Noise levels of the user's own, if there are any, as a keyword of the pipeline's call.

    Raises:
        InputError: its call takes none.
    """
    if sigmas is None:
        return {}
    if "sigmas" not in inspect.signature(type(pipeline).__call__).parameters:
        raise InputError(f"{type(pipeline).__name__} takes no noise levels of one's own: leave sigmas out")
    return {"sigmas": list(sigmas)}


def ragged_mask(states: torch.Tensor) -> torch.Tensor:
    """An example of a mask for texts [B, L, D]: no two of them equally long, all with padding; int64, as tokenizers have it."""
    length = states.shape[1]
    lengths = [max(1, length - 1 - sample) for sample in range(len(states))]
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def without_variance(config: Any) -> tuple[int, int] | None:
    """The channels of the output that sampling takes: the first half, of a network that gives a variance besides."""
    given, made = config.get("in_channels"), config.get("out_channels")
    return (0, given) if given is not None and made == 2 * given else None


def widened(velocity: torch.Tensor, axis: int, kept: tuple[int, int], channels: int) -> torch.Tensor:
    """A velocity as the ``kept`` part of so many channels along ``axis``, the others zero."""
    begin, end = kept
    whole = torch.nn.functional.pad(torch.movedim(velocity, axis, -1), (begin, channels - end))
    return torch.movedim(whole, -1, axis)


def spread(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Latents [B, C, F, H, W] with the mean and deviation by channel that a video autoencoder's configuration has."""
    mean, deviation = _by_channel(latents, config)
    return latents * deviation + mean


def unspread(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """What :func:`spread` takes, from what it gives."""
    mean, deviation = _by_channel(latents, config)
    return (latents - mean) * (1.0 / deviation)


def _by_channel(latents: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = (torch.tensor(one).view(1, -1, 1, 1, 1).to(latents) for one in (config.latents_mean, config.latents_std))
    return mean, deviation


def only_scale(scales: Array | None, rule: str) -> float:
    """The one guidance scale of all requests; of those without, the one at which ``rule`` has one branch.

    Raises:
        InputError: there are several.
    """
    if scales is None:
        return UNGUIDED[rule]
    different = np.unique(scales)
    if len(different) != 1:
        raise InputError(f"a pipeline's call takes one guidance scale, not {', '.join(map(str, different))}")
    return float(different[0])


def check_texts(model: LoadedModel, settings: Settings) -> None:
    """Raise ``InputError`` unless texts of several lengths, if these are asked for, give the same pictures."""
    if settings.shorter_texts and model.io.text is None:
        lengths = ", ".join(map(str, (*settings.shorter_texts, settings.text_tokens)))
        raise InputError(
            f"text-tokens are {lengths}, but {model.spec.name} looks at what a text is padded with, or is not known not to: "
            "another length is another picture. Give one"
        )
