"""What can be seen of a transformer that no family knows: where its blocks are, and which input plays which part.

``B`` batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cachec.compiler.models.inputs import without_variance
from cachec.compiler.models.observed import Call, Observed
from cachec.runtime.errors import InputError
from cachec.runtime.model_io import ModelIO

TIMES = ("timestep", "timesteps", "t", "time")  # what transformers call their time


def find_cut(module: nn.Module) -> str:
    """The last block of the one list of blocks that there is.

    Raises:
        InputError: there is none, or there are several: which of them is the last to run cannot be seen, so it is asked.
    """
    lists = block_lists(module)
    kind = type(module).__name__
    if not lists:
        children = ", ".join(name for name, _ in module.named_children())
        raise InputError(
            f"{kind} has no list of blocks (only {children}): name the last block by --cut, as named_modules() has it"
        )
    *others, last = lists
    cut = f"{last}.{lists[last] - 1}"
    if others:
        found = ", ".join(f"{name} ({count} blocks)" for name, count in lists.items())
        raise InputError(f"{kind} has several lists of blocks: {found}. Say behind which block forecasts begin; if they run in "
                         f"this order, --cut {cut}")  # fmt: skip
    return cut


def block_lists(module: nn.Module) -> dict[str, int]:
    """Lists of modules of several parts, by path, with how many there are; those inside of blocks are none."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(part, nn.ModuleList) and len(part) > 1 and not inside and all(any(one.children()) for one in part):
            found[path] = len(part)
    return found


def is_one_branch(seen: Observed, batch: int) -> bool:
    """Does the pipeline call its transformer once a step, with one row for each of ``batch`` samples?"""
    rows = {
        len(value) for call in seen.calls for value in call.given.values() if isinstance(value, torch.Tensor) and value.ndim
    }
    return len(seen.calls) == len({call.step for call in seen.calls}) and batch in rows and 2 * batch not in rows


def infer_io(few: Observed, many: Observed, config: Any) -> ModelIO:
    """Names of inputs by the part that they play, from runs with other numbers of samples and prompts of other lengths.

    The latents come first; what is called a time is the time; all else that has a row for each sample is a condition.

    Raises:
        InputError: an input is a list, there is no time, or texts are not padded to one length.
    """
    one, other = few.calls[0], many.calls[0]
    by_sample = _by_sample(one, other)
    times = [name for name in by_sample if name in TIMES]
    latents = next((name for name, value in one.given.items() if name in by_sample and value.is_floating_point()), None)
    if latents is None or len(times) != 1 or latents == times[0]:
        raise InputError(f"which input is what cannot be seen: the transformer gets {', '.join(one.given)}")
    conditions = tuple(name for name in by_sample if name not in (latents, *times))
    return ModelIO(latents, times[0], conditions, output=without_variance(config))


def _by_sample(one: Call, other: Call) -> Sequence[str]:
    """Names of the inputs with a row for each sample."""
    found = []
    for name, value in one.given.items():
        if isinstance(value, list | tuple) and any(isinstance(part, torch.Tensor) for part in value):
            raise InputError(f"the transformer gets {name} as a list of tensors; what is captured has a batch axis")
        if not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        beside = other.given[name]
        if value.shape[1:] != beside.shape[1:]:
            shapes = f"{list(value.shape)} for some prompts and {list(beside.shape)} for others"
            raise InputError(f"{name} is {shapes}: texts must be padded to one length")
        if len(value) != len(beside):
            found.append(name)
    return found
