"""A transformer on disk: its weights in safetensors files are named, checked against the model, and read one by one.

Only the headers are read beforehand. A tensor is read, not mapped: pages of a mapped file count as the process's own memory,
and the files may be larger than that.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import nn

from cachec.runtime.errors import ModelUnavailableError, shortened
from cachec.runtime.files import reason_of

WEIGHT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {**WEIGHT_TYPES, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # of buffers, too
AGAIN = "download it again"
MAKE_AGAIN = "Download the model again, or distil it again if cachec distill made it"
OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".msgpack", ".pt", ".pth")  # of weights
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")  # name of a shard
MAX_HEADER = 100 << 20  # bytes, as in the format's own library
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``begin`` and ``size`` in bytes of ``file``."""

    file: Path
    begin: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Update:
    """What a LoRA adds to a weight [N, …]: ``scale`` times ``up`` [N, R] by ``down`` [R, …]; convolutions may have more axes.

    ``origin`` says where it is from, and is the same for the same update in all processes.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    origin: Hashable

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum, in the weight's type."""
        up, down = (tensor.to(weight.dtype).flatten(1) for tensor in (self.up, self.down))
        return torch.add(weight, (up @ down).reshape(weight.shape), alpha=self.scale)


@dataclass(frozen=True, eq=False)
class Shards:
    """Tensors by name, in ``files``; in none, of a model of which only the configuration is there.

    ``updates``: what is added, in float32, to those that a LoRA changes.
    """

    places: Mapping[str, Place]
    files: Sequence[Path] = ()
    updates: Mapping[str, Sequence[Update]] = field(default_factory=dict)

    @classmethod
    def open(cls, files: Sequence[Path]) -> Self:
        """Read the headers of ``files``.

        Raises:
            ModelUnavailableError: a file is missing, damaged or truncated, or two hold a tensor of the same name.
        """
        places: dict[str, Place] = {}
        for file in files:
            for name, place in _header(file):
                if name in places:
                    raise ModelUnavailableError(f"{name} is in {places[name].file} and in {file}: remove one of them")
                places[name] = place
        return cls(places, files)

    def key(self, name: str) -> Hashable:
        """The same for tensors of the same value, in all processes that open the same files."""
        return (*map(str, self.files), name, *(update.origin for update in self.updates.get(name, ())))

    def dtype(self, name: str) -> torch.dtype | None:
        """The type that a tensor is read in; ``None`` where there are no values."""
        place = self.places.get(name)
        return torch.float32 if name in self.updates else None if place is None else place.dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the type that it is stored in; in float32 if it is updated.

        Raises:
            ModelUnavailableError: its file is gone, or has become shorter, or there never was one.
        """
        stored = self._read_plain(name)
        if not (updates := self.updates.get(name)):
            return stored
        sum_ = stored.float()
        for update in updates:
            sum_ = update.added_to(sum_)
        return sum_

    def _read_plain(self, name: str) -> torch.Tensor:
        """The tensor without updates. Raises as :meth:`read`."""
        place = self.places.get(name)
        if place is None:
            raise ModelUnavailableError(f"{name} has no values: of this model only the configuration was given")
        content = bytearray(place.size)
        try:
            with place.file.open("rb", buffering=0) as file:
                file.seek(place.begin)
                _fill(content, file)
        except OSError as error:
            raise ModelUnavailableError(f"{place.file} cannot be read: {reason_of(error)}; {AGAIN}") from error
        whole = torch.frombuffer(content, dtype=place.dtype) if content else torch.empty(0, dtype=place.dtype)
        return whole.reshape(place.shape)


@dataclass(frozen=True, eq=False)
class Stored:
    """A transformer on disk: the ``module``, its parameters without values, its buffers with theirs, and the weights' files.

    ``loras``: what is fused with the weights, by name of a file, with its ``sha256`` and ``scale``.
    """

    module: nn.Module
    shards: Shards
    loras: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def open(cls, build: Callable[[], nn.Module], files: Sequence[Path], configuration: Path) -> Self:
        """Read the files' headers, and compare them with the module that ``build`` makes from ``configuration``.

        Raises:
            ModelUnavailableError: a file is missing, damaged or truncated, or its tensors are not the module's; names the first
                that is missing, left over or of another shape.
        """
        shards = Shards.open(files)
        module = cls.outline(build).module
        _check(shards, module, configuration)
        for name, buffer in module.named_buffers():
            if name in shards.places:
                with torch.no_grad():
                    buffer.copy_(shards.read(name))
        return cls(module, shards)

    def fused(self, updates: Mapping[str, Sequence[Update]], loras: Sequence[Mapping[str, Any]]) -> Self:
        """With these updates of its weights, by name."""
        return replace(self, shards=replace(self.shards, updates=updates), loras=loras)

    @torch.no_grad()
    def fuse_into(self, module: nn.Module) -> None:
        """Give ``module``, which has the plain weights, those that are updated."""
        for name in self.shards.updates:
            module.get_parameter(name).copy_(self.shards.read(name))

    @classmethod
    def outline(cls, build: Callable[[], nn.Module]) -> Self:
        """The module that ``build`` makes, without files: for what shapes tell. Its weights can be named, and not be read."""
        with init_empty_weights(include_buffers=False):
            return cls(build().eval(), Shards({}))


def _check(shards: Shards, module: nn.Module, configuration: Path) -> None:
    wrong = f"the weights do not fit {configuration}: "
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for names, what in ((shapes.keys() - shards.places, "is missing"), (shards.places.keys() - shapes, "is not the model's")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelUnavailableError(f"{wrong}{min(names)} {what}{more}. {MAKE_AGAIN}")
    for name, _ in module.named_parameters():
        if not (place := shards.places[name]).dtype.is_floating_point:
            raise ModelUnavailableError(f"{name} in {place.file} is {place.dtype}: quantised weights cannot be compiled. "
                                        f"Pass weights in {', '.join(WEIGHT_TYPES)}")  # fmt: skip
    for name, place in shards.places.items():
        if place.shape != tuple(shapes[name]):
            raise ModelUnavailableError(
                f"{wrong}{name} in {place.file.name} is {list(place.shape)}, not {list(shapes[name])}. {MAKE_AGAIN}"
            )


def _fill(content: bytearray, file: Any) -> None:
    view = memoryview(content)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(f"it ends {len(view)} bytes early")
        view = view[count:]


def _header(file: Path) -> Iterable[tuple[str, Place]]:
    """Tensors of one file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(LENGTH.size)
            (length,) = LENGTH.unpack(first) if len(first) == LENGTH.size else (MAX_HEADER + 1,)
            content = json.loads(stream.read(length)) if length <= min(size, MAX_HEADER) else None
    except OSError as error:
        raise ModelUnavailableError(f"{file} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise ModelUnavailableError(f"{file} is damaged: its header is no JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelUnavailableError(f"{file} is no safetensors file, or is cut off: its header is not whole; {AGAIN}")
    start = LENGTH.size + length
    for name, facts in content.items():
        if name != "__metadata__":
            yield name, _place(file, name, facts, start, size)


def _place(file: Path, name: str, facts: Any, start: int, file_size: int) -> Place:
    try:
        begin, end = map(index, facts["data_offsets"])
        shape, kind = tuple(map(index, facts["shape"])), str(facts["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelUnavailableError(f"{file} is damaged: its header says of {name} {shortened(facts)}; {AGAIN}") from error
    if kind not in TYPES:
        raise ModelUnavailableError(f"{name} in {file} is {kind}: quantised weights cannot be compiled. "
                                    f"Pass weights in {', '.join(WEIGHT_TYPES)}")  # fmt: skip
    if min(begin, *shape, 0) < 0 or end - begin != math.prod(shape) * TYPES[kind].itemsize:
        raise ModelUnavailableError(f"{file} is damaged: {name} of {list(shape)} {kind} has {end - begin} bytes; {AGAIN}")
    if start + end > file_size:
        raise ModelUnavailableError(f"{file} is cut off: it has {file_size} bytes, and {name} ends at {start + end}; {AGAIN}")
    return Place(file, start + begin, end - begin, shape, TYPES[kind])


def weight_files(source: str, folder: Path) -> list[Path]:
    """The safetensors files of a component of diffusers: all that the index names, if there is one; ``source`` is for messages.

    Raises:
        ModelUnavailableError: the index is damaged, shards are missing, or there are none.
    """
    whole = folder / "diffusion_pytorch_model.safetensors"  # beside which there may be those of other precisions
    if (listed := whole.with_name(f"{whole.name}.index.json")).is_file():
        try:
            named = set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(folder / name for name in named)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ModelUnavailableError(f"{listed} is damaged: it has no weight_map ({error!r}); {AGAIN}") from error
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS)
        wrong = f"only {others[0]}, and cachec reads safetensors: save them in that format" if others else "none: download them"
        raise ModelUnavailableError(f"of the weights of {source}, {folder} has {wrong}")
    _check_numbered(files)
    return files


def _check_numbered(files: Sequence[Path]) -> None:
    """Raise ``ModelUnavailableError`` if shards say that there are more of them than there are."""
    named = [(NUMBERED.fullmatch(path.name), path) for path in files]
    for stem, count in {(found["stem"], found["count"]) for found, _ in named if found is not None}:
        there = {int(found["number"]) for found, _ in named if found is not None and found["stem"] == stem}
        if missing := sorted(set(range(1, int(count) + 1)) - there):
            name = f"{stem}-{missing[0]:0{len(count)}d}-of-{count}.safetensors"
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelUnavailableError(f"{files[0].with_name(name)} is missing{more}: {AGAIN}")
