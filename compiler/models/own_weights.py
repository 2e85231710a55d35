"""Hash of a transformer's weights: of its files, or of what is in memory, where that is not what the files say."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachec.compiler.models.shards import Shards, Stored, weight_files
from cachec.runtime.errors import ModelUnavailableError
from cachec.runtime.files import hash_file, reason_of
from cachec.runtime.hashing import hashing


class OwnHash:
    """The hash of a transformer's weights, made when it is asked for.

    Of its files if it is ``stored``, or if those in ``folder`` have its very weights; else of the ``module`` in memory.
    ``source`` is for messages.
    """

    def __init__(self, source: str, stored: Stored | None, folder: Path | None, module: Callable[[], nn.Module]) -> None:
        self._source, self._stored, self._folder, self._module = source, stored, folder, module
        self._digests: Callable[[], list[str]] | None = None  # of the files, if they are being made

    @cached_property
    def value(self) -> str:
        """SHA-256, in hexadecimal.

        Raises:
            ModelUnavailableError: a file cannot be read.
        """
        if not (files := self._files()):
            return hash_tensors(self._module())
        try:
            return hash_digests([hash_file(file) for file in files] if self._digests is None else self._digests())
        except OSError as error:
            raise ModelUnavailableError(f"the weights of {self._source} cannot be read: {reason_of(error)}") from error

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within it, files are hashed beside other work."""
        if self._stored is None or "value" in vars(self):
            yield
            return
        with hashing(self._files()) as self._digests:
            try:
                yield
            finally:
                self._digests = None

    def _files(self) -> list[Path]:
        if self._stored is not None:
            return list(self._stored.shards.files)
        return [] if self._folder is None else files_of(self._source, self._folder, self._module())


def hash_with_loras(plain: str, loras: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of weights with LoRAs fused; ``plain`` is that without, and ``loras`` are as ``LoadedModel.loras``."""
    return (
        hash_digests([plain, *(json.dumps([one["sha256"], one["scale"], one.get("part")]) for one in loras)])
        if loras
        else plain
    )


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
