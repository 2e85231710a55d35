"""Hash of a transformer's weights: of its files, or of what is in memory, where that is not what the files say."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cachec.compiler.models.shards import Shards, weight_files
from cachec.runtime.errors import ModelUnavailableError


def files_of(source: str, folder: Path, module: nn.Module) -> list[Path]:
    """Those in ``folder`` with the very weights of ``module``, which may have become different from them; or none."""
    if not folder.is_dir():
        return []
    try:
        shards = Shards.open(files := weight_files(source, folder))
    except ModelUnavailableError:  # the weights are in memory, and what lies beside is not looked for
        return []
    held = module.state_dict()
    same = held.keys() == shards.places.keys() and all(
        torch.equal(shards.read(name).to(value.dtype), value.cpu()) for name, value in held.items()
    )
    return files if same else []


def hash_digests(digests: Sequence[str]) -> str:
    """SHA-256 over those of files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def hash_tensors(module: nn.Module) -> str:
    """SHA-256 over the tensors of a module."""
    tensors = sorted(module.state_dict().items())
    return hashlib.sha256(b"".join(hashlib.sha256(_raw(tensor)).digest() for _, tensor in tensors)).hexdigest()


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
