"""Further weights for graphs that a bundle has: a weights file of those alone that are changed, and what says where they lie.

An ONNX graph gets a second ONNX file, a copy of the first in which changed initializers lie in the new file, or inside it if
they are small, and all others where they were. A program of PyTorch gets JSON (``engines.torch_weights``).
"""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from cachec.engines.onnx_files import TALKING, NamedWeights, converted, is_shared, only_errors
from cachec.engines.onnx_weights import LateWeight, contents, identity
from cachec.engines.weights_file import Unfinished, WeightsFile
from cachec.runtime.errors import BundleError
from cachec.runtime.files import write_file, writing
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ChangedWeights(NamedWeights, Protocol):
    """Values of weights that programs hold as fake tensors, some of which differ from those of a bundle."""

    def is_changed(self, tensor: torch.Tensor) -> bool:
        """Does it differ, or may it?"""


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of a bundle: its program with the new weights, and its ONNX file, if there is one."""

    program: "ExportedProgram"
    signature: Signature
    onnx: Path | None


@dataclass(frozen=True)
class Changed:
    """What was written: files by graph, for ONNX and for programs, of graphs that have changed weights; and the weights."""

    onnx: Mapping[str, Path]
    constants: Mapping[str, Path]
    weights: Path
    weights_sha256: str


@only_errors(*TALKING)
def write_changed(
    graphs: Mapping[str, Graph], out: Path, weights: ChangedWeights, unfinished: Unfinished, *, constants: bool, tag: str
) -> Changed:
    """Write what is changed into ``out``; ``tag`` is part of the files' names. ``constants``: also for programs of PyTorch.

    Raises:
        BundleError: a bundle's ONNX file is of another graph.
        OutputError: the disk has no room for them, or they cannot be written.
    """
    models = {name: _Copy.of(name, graph, graph.onnx, weights) for name, graph in graphs.items() if graph.onnx is not None}
    tensors = [tensor for copy in models.values() for tensor in copy.changed.values() if is_shared(tensor)]
    late = {weights.key(tensor.fake): tensor for tensor in tensors if isinstance(tensor, LateWeight)}
    named = {name: dict(_constants(graph.program, weights, late)) for name, graph in graphs.items() if constants}
    tensors += [tensor for some in named.values() for tensor in some.values()]
    once = {identity(tensor): tensor for tensor in tensors}
    with WeightsFile(unfinished) as file:
        file.expect(tensor.nbytes for tensor in once.values())
        places = {what: file.place(what, contents(tensor)) for what, tensor in once.items()}
        path = file.finish(out)
    written = {name: copy.save(out / f"{name}-{tag}.onnx", path, places) for name, copy in models.items() if copy.changed}
    said = {name: out / f"{name}-{tag}.json" for name, some in named.items() if some}
    for name, place in said.items():
        facts = {key: _place(places[identity(tensor)][0], tensor) for key, tensor in named[name].items()}
        write_file(place, json.dumps({"weights": path.name, "constants": facts}, indent=1).encode())
    return Changed(written, said, path, file.digest)


def _constants(
    program: "ExportedProgram", weights: ChangedWeights, known: Mapping[Hashable, LateWeight]
) -> Iterator[tuple[str, LateWeight]]:
    """The changed constants of a program; where ONNX has them with permuted axes, so: once in the file is enough."""
    for name, tensor in program.state_dict.items():
        if weights.is_changed(tensor):
            own = LateWeight(tensor, weights, from_torch_dtype(tensor.dtype), name)
            yield name, known.get(weights.key(tensor), own)


def _place(begin: int, tensor: LateWeight) -> dict[str, Any]:
    """Where a constant lies, as ``engines.torch_weights`` reads it."""
    dtype = str(tensor.fake.dtype).removeprefix("torch.")
    return {"begin": begin, "shape": list(tensor.fake.shape), "dtype": dtype, "axes": tensor.axes}


@dataclass(frozen=True, eq=False)
class _Copy:
    """The ``model`` in a bundle's ONNX file, and the initializers that are ``changed``, with their new values."""

    model: Any
    changed: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, graph: Graph, there: Path, weights: ChangedWeights) -> "_Copy":
        old, new = onnx_ir.load(there), converted(graph.program, graph.signature, weights)
        if _outline(old) != _outline(new):
            raise BundleError(
                f"{there.name} is not the {name} graph that this cachec makes of the model: another version of cachec or "
                "PyTorch made it. Compile the bundle again"
            )
        both = {
            key: (value.const_value, new.graph.initializers[key].const_value) for key, value in old.graph.initializers.items()
        }
        return cls(old, {key: after for key, (before, after) in both.items() if _differs(before, after, weights)})

    def save(self, out: Path, file: Path, places: Mapping[Any, tuple[int, int]]) -> Path:
        for key, tensor in self.changed.items():
            if is_shared(tensor):
                tensor = onnx_ir.ExternalTensor(
                    file.name, *places[identity(tensor)], tensor.dtype, shape=tensor.shape, name=key, base_dir=str(out)
                )
            self.model.graph.initializers[key].const_value = tensor
        with writing(out):
            onnx_ir.save(self.model, out)
        return out


def _outline(model: Any) -> list[Any]:
    """All of a model but the values of its initializers."""
    kept = sorted(
        (key, value.const_value.dtype, tuple(value.const_value.shape)) for key, value in model.graph.initializers.items()
    )
    nodes = [(node.domain, node.op_type, _names(node.inputs), _names(node.outputs)) for node in model.graph]
    return [kept, nodes, _names(model.graph.inputs), _names(model.graph.outputs)]


def _names(values: Sequence[Any]) -> tuple[str | None, ...]:
    return tuple(None if value is None else value.name for value in values)


def _differs(before: Any, after: Any, weights: ChangedWeights) -> bool:
    """Large ones are told by what they are made of; those that were made while a graph was written, by their bytes."""
    if isinstance(after, LateWeight):
        return weights.is_changed(after.fake)
    same: bool = before.tobytes() == after.tobytes()
    return not same
