"""Some values of every weight, to tell whether a pipeline's transformer is the one that a bundle was compiled from.

A file of weights may be stored in float32 and loaded in bfloat16: samples are compared in the type that is held.
"""

from collections.abc import Mapping

import torch

from cachec.compiler.models.base import LoadedModel
from cachec.compiler.models.shards import Shards

NUM_SAMPLES = 16  # of each tensor, spread evenly
LOW = (torch.float16, torch.bfloat16)


def sample_weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Up to about ``NUM_SAMPLES`` values of every weight, by name; float32 where they are stored in fewer bits."""
    if model.stored is not None:
        shards = model.stored.shards
        return {name: _widened(_stored(shards, name)) for name in shards.places}
    return {name: _widened(sample(tensor)) for name, tensor in model.transformer.state_dict().items()}


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Values of a tensor at even distances, on the CPU."""
    return tensor.detach().reshape(-1)[:: _stride(tensor.numel())].cpu().contiguous()


def difference(known: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> str | None:
    """How the weights ``held``, by name, differ from those that were sampled, in words; ``None``: they do not."""
    if added := sorted(held.keys() - known.keys()):
        lora = next((name for name in added if "lora" in name.lower() or ".base_layer." in name), None)
        return f"{lora} is loaded, an adapter" if lora else f"there is {added[0]}"
    if missing := sorted(known.keys() - held.keys()):
        return f"{missing[0]} is not there"
    for name, tensor in held.items():
        found = sample(tensor)
        if found.shape != known[name].shape or not torch.equal(known[name].to(found.dtype), found):
            return f"{name} has other values"
    return None


def _stride(num: int) -> int:
    return max(1, num // NUM_SAMPLES) | 1  # odd: no column of a matrix alone


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in LOW else tensor


def _stored(shards: Shards, name: str) -> torch.Tensor:
    place = shards.places[name]
    num, size = place.size // place.dtype.itemsize, place.dtype.itemsize
    content = bytearray()
    with place.file.open("rb", buffering=0) as file:
        for index in range(0, num, _stride(num)):
            file.seek(place.begin + index * size)
            content += file.read(size)
    return torch.frombuffer(content, dtype=place.dtype) if content else torch.empty(0, dtype=place.dtype)
