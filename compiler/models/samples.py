"""Some values of every weight, to tell whether a pipeline's transformer is the one that a bundle was compiled from.

A file of weights may be stored in float32 and loaded in bfloat16: samples are compared in the type that is held. Where a LoRA
is fused, the pipeline has rounded its own sum otherwise: such a weight must be as near to ours as rounding takes it, and all
together must have moved as far from the plain ones, and in the same direction, as ours have.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cachec.compiler.models.base import LoadedModel
from cachec.compiler.models.shards import Shards, Update

NUM_SAMPLES = 16  # of each tensor, spread evenly
LOW = (torch.float16, torch.bfloat16)
PLAIN = "without LoRA: "  # begins the name of what a weight was before
ROUNDINGS = 4  # that a fused weight may be away from ours, of the largest value
SAME_SCALE = 0.05  # that all together may have moved more or less than ours


def sample_weights(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Up to about ``NUM_SAMPLES`` values of every weight, by name; float32 where they are stored in fewer bits.

    Of those that a LoRA changes, also of what they were.
    """
    if model.stored is None:
        return {name: _widened(sample(tensor)) for name, tensor in model.transformer.state_dict().items()}
    shards = model.stored.shards
    found = {name: _widened(_stored(shards, name)) for name in shards.places}
    for name, updates in shards.updates.items():
        found[f"{PLAIN}{name}"] = found[name].float()
        found[name] = _updated(found[name], updates)
    return found


def held_samples(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """As many values of what a pipeline's transformer holds; with the LoRAs that PEFT keeps beside it and that are active."""
    held = {name: sample(tensor) for name, tensor in transformer.state_dict().items()}
    for path, layer in lora_layers(transformer):
        inner = f"{path}.base_layer."
        wrapped = {name.replace(inner, f"{path}."): value for name, value in held.items() if name.startswith(inner)}
        held = {name: value for name, value in held.items() if not name.startswith(f"{path}.")}
        weight = wrapped[f"{path}.weight"]
        held |= {**wrapped, f"{path}.weight": _updated(weight, _active(layer)).to(weight.dtype)}
    return held


def lora_layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers by path: those that are the sum of what they wrap and of LoRAs."""
    needed = ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters", "merged_adapters", "disable_adapters")
    return [
        (path, module)
        for path, module in transformer.named_modules()
        if all(hasattr(module, name) for name in needed) and not any(dict(getattr(module, "use_dora", {})).values())
    ]


def _active(layer: Any) -> list[Update]:
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    return [
        Update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], name)
        for name in names
        if name not in layer.merged_adapters
    ]


@torch.no_grad()
def _updated(samples: torch.Tensor, updates: Any) -> torch.Tensor:
    """Samples of a weight, in float32, with ``updates`` of it."""
    total = samples.float()
    for update in updates:
        up, down = update.up.flatten(1), update.down.flatten(1)
        num = len(up) * down.shape[1]
        at = torch.arange(0, num, _stride(num), device=up.device)
        rows, columns = up[at // down.shape[1]].float(), down[:, at % down.shape[1]].float()
        total = total + update.scale * (rows * columns.T).sum(1).cpu()
    return total


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Values of a tensor at even distances, on the CPU."""
    return tensor.detach().reshape(-1)[:: _stride(tensor.numel())].cpu().contiguous()


def difference(known: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> str | None:
    """How the samples ``held``, by name, differ from those that are ``known``, in words; ``None``: they do not."""
    plain = {name.removeprefix(PLAIN): value for name, value in known.items() if name.startswith(PLAIN)}
    known = {name: value for name, value in known.items() if not name.startswith(PLAIN)}
    if added := sorted(held.keys() - known.keys()):
        lora = next((name for name in added if "lora" in name.lower() or ".base_layer." in name), None)
        return f"{lora} is loaded, an adapter" if lora else f"there is {added[0]}"
    if missing := sorted(known.keys() - held.keys()):
        return f"{missing[0]} is not there"
    if any(held[name].shape != value.shape for name, value in known.items()):
        return "a weight has another shape"
    for name, found in held.items():
        if name not in plain and not torch.equal(known[name].to(found.dtype), found):
            return f"{name} has other values"
    return _lora_difference(known, plain, held)


def _lora_difference(
    known: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]
) -> str | None:
    """As :func:`difference`, of weights that a LoRA changes: in the type that is held, a small change may be none."""
    moved = wanted = 0.0
    far = None
    for name, before in plain.items():
        found = held[name]
        ours, old = (value.to(found.dtype).float() for value in (known[name], before))
        moved += float(((found.float() - old) * (ours - old)).sum())
        wanted += float((ours - old).square().sum())
        room = ROUNDINGS * torch.finfo(found.dtype).eps * float(torch.maximum(ours.abs(), old.abs()).max())
        if far is None and float((found.float() - ours).abs().max()) > room:
            far = name
    if wanted and not abs(moved / wanted - 1) <= SAME_SCALE:
        return f"its weights have {moved / wanted:.2f} of what the LoRA that the bundle was compiled with adds"
    return None if far is None else f"{far} has other values"


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
