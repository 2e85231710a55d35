"""Further weights for programs of PyTorch: a JSON file for a graph says where in a weights file its changed constants lie."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cachec.runtime.errors import BundleError, in_one_line


def read_constants(path: Path, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The changed constants by name, on the CPU.

    Raises:
        BundleError: it cannot be read, or the program, whose constants are ``known``, has no such ones.
    """
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {name: _read(path.with_name(said["weights"]), **facts) for name, facts in said["constants"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BundleError(f"{path.name} cannot be read: {in_one_line(error)}. Add these weights again, with --force") from error
    for name, value in found.items():
        if name not in known or (known[name].shape, known[name].dtype) != (value.shape, value.dtype):
            raise BundleError(f"the engine has no constant {name} {list(value.shape)} {value.dtype}, which {path.name} is for: "
                              "add these weights again, with --force")  # fmt: skip
    return found


def _read(file: Path, *, begin: int, shape: Sequence[int], dtype: str, axes: Sequence[int] | None) -> torch.Tensor:
    """A tensor of this shape, which lies there with its ``axes`` permuted."""
    kind: torch.dtype = getattr(torch, dtype)
    content = bytearray(torch.Size(shape).numel() * kind.itemsize)
    with file.open("rb") as stream:
        stream.seek(begin)
        if stream.readinto(content) != len(content):
            raise ValueError(f"{file.name} is cut off")
    there = torch.frombuffer(content, dtype=kind)
    if axes is None:
        return there.reshape(shape)
    return there.reshape([shape[axis] for axis in axes]).permute([axes.index(axis) for axis in range(len(axes))]).contiguous()
