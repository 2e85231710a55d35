"""How much of a computed step its own matrix products are: ``python -m bench.products CASE [WORK [OUT]]``, for ONNX Runtime.

The products (Gemm, MatMul, and those inside Attention) of the bundle's compute file become an ONNX file of nothing else, with
the same shapes at batch 1 and the same constant factors, so that they are packed as the step's own are. Both files run with
the settings of ``engines/ort.py`` in processes of their own, one at a time and by turns: two thread pools spin against each
other. WORK holds the bundle (``python -m bench.speed --only bundles``). Prints ``{step_ms, products_ms, share}`` by number of
threads, or writes it into OUT.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from bench.bundles import bundle_path
from bench.cases import SHAPED, TINY
from bench.timing import spread, write_part
from cachec.engines.ort import open_session
from cachec.runtime.abi import COMPUTE
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array, Signature, TensorSpec

PRODUCTS = ("Gemm", "MatMul", "Attention")
PAIRS = {TINY: 30, SHAPED: 10}  # a process of the latter takes eight seconds
QUICK_PAIRS = 3
SECONDS, QUICK_SECONDS = 1.0, 0.2  # of calls in each process


def products_model(step: onnx.ModelProto) -> onnx.ModelProto:
    """A model of nothing but the products of ``step``, at batch 1.

    Factors that are weights stay constants, with the same values; others are inputs, one for each, as ONNX Runtime would make
    equal products once. Attention becomes its two products. Every result is an output, or it would not be made.

    Raises:
        InputError: the model has no product.
    """
    nodes = [node for node in step.graph.node if node.op_type in PRODUCTS]
    if not nodes:
        raise InputError(f"the step's ONNX file has none of {', '.join(PRODUCTS)}: its products cannot be taken out")
    weights = {tensor.name: tensor for tensor in step.graph.initializer}
    inner = [name for node in nodes for name in (*node.input[:3], node.output[0]) if name and name not in weights]
    values = intermediate_values(step, list(dict.fromkeys(inner)))
    made = _Products(weights, values)
    for node in nodes:
        made.add_attention(node) if node.op_type == "Attention" else made.add_product(node)
    graph = helper.make_graph(made.nodes, "products", made.inputs, made.outputs, made.initializers)
    return helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)


class _Products:
    """Collects nodes; the names of inputs and outputs count up."""

    def __init__(self, weights: Mapping[str, TensorProto], values: Mapping[str, Array]) -> None:
        self._weights, self._values = weights, values
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._used: dict[str, TensorProto] = {}

    @property
    def initializers(self) -> list[TensorProto]:
        return list(self._used.values())

    def add_product(self, node: onnx.NodeProto) -> None:
        """The node as it is."""
        factors = [self._factor(name) for name in node.input]
        result = self._values[node.output[0]]
        self._add(node.op_type, factors, (result.shape, result.dtype), node.attribute)

    def add_attention(self, node: onnx.NodeProto) -> None:
        """Scores and result, by head: Q Kᵀ and weights V."""
        heads = {a.name: a.i for a in node.attribute if a.name.endswith("num_heads")}
        q, k, v = (
            _by_head(self._values[name].shape, heads.get(f"{side}_num_heads", 0))
            for name, side in zip(node.input[:3], ("q", "kv", "kv"), strict=True)
        )
        scores = (*q[:3], k[2])
        dtype = self._values[node.input[0]].dtype
        self._add("MatMul", [self._input(q, dtype), self._input((*k[:2], k[3], k[2]), dtype)], (scores, dtype))
        self._add("MatMul", [self._input(scores, dtype), self._input(v, dtype)], ((*q[:3], v[3]), dtype))

    def _factor(self, name: str) -> str:
        if name in self._weights or not name:
            if name:
                self._used[name] = self._weights[name]
            return name
        return self._input(self._values[name].shape, self._values[name].dtype)

    def _input(self, shape: Sequence[int], dtype: np.dtype[Any]) -> str:
        name = f"factor_{len(self.inputs)}"
        self.inputs.append(_value_info(name, shape, dtype))
        return name

    def _add(
        self, kind: str, factors: Sequence[str], result: tuple[Sequence[int], np.dtype[Any]], attributes: Sequence[Any] = ()
    ) -> None:
        name = f"product_{len(self.outputs)}"
        node = helper.make_node(kind, factors, [name], name=name)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        self.outputs.append(_value_info(name, *result))


def _value_info(name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)


def _by_head(shape: Sequence[int], heads: int) -> tuple[int, ...]:
    """[B, H, L, D] of a factor of Attention, which may come as [B, L, H D]."""
    return tuple(shape) if len(shape) == 4 else (shape[0], heads, shape[1], shape[2] // heads)


def intermediate_values(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, Array]:
    """What ONNX Runtime computes for tensors inside a model, from random inputs at batch 1."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in (*shown.graph.output, *shown.graph.input)}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    with tempfile.TemporaryDirectory() as folder:  # models above 2 GiB have their weights beside them
        path = Path(folder) / "model.onnx"
        onnx.save(shown, path, save_as_external_data=True, size_threshold=1024)
        session = open_session(path, ["CPUExecutionProvider"])
        given = {one.name: _random(one) for one in session.get_inputs()}
        asked = [name for name in names if name not in given]
        return given | dict(zip(asked, session.run(asked, given), strict=True))


def _random(given: onnxruntime.NodeArg) -> Array:
    """A value for an input, in which every symbolic size is 1."""
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    kind = getattr(TensorProto, given.type.removeprefix("tensor(").removesuffix(")").upper())
    values: Array = np.random.default_rng(0).standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(kind))
    return values


def signature_of(model: onnx.ModelProto) -> Signature:
    """Inputs and outputs of a model whose sizes are fixed."""
    inputs, outputs = ([_spec(value) for value in side] for side in (model.graph.input, model.graph.output))
    return Signature(tuple(inputs), tuple(outputs))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(size.dim_value for size in kind.shape.dim)
    return TensorSpec(value.name, shape, helper.tensor_dtype_to_np_dtype(kind.elem_type).name)


def measure_pairs(tasks: Mapping[str, Mapping[str, Any]], *, threads: int, pairs: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a call of each task, in processes that take turns, and the share: of one in the other, pair by pair."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(pairs):
        for name in list(tasks)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(time_in_child({**tasks[name], "threads": threads, "seconds": seconds}))
    shares = [part / whole for whole, part in zip(found["step"], found["products"], strict=True)]
    return {
        "pairs": pairs, "step_ms": spread(found["step"]), "products_ms": spread(found["products"]), "share": spread(shares),
    }  # fmt: skip


def time_in_child(task: Mapping[str, Any]) -> float:
    """Median milliseconds of a call in a fresh process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", "bench.products_child"]
    child = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{task['file']} failed:\n{child.stderr[-2000:]}")
    return float(json.loads(child.stdout.splitlines()[-1])["ms"])


def make_tasks(bundle: Bundle, folder: Path) -> dict[str, dict[str, Any]]:
    """The compute file of a bundle, and the file of its products, which is written into ``folder``.

    Raises:
        InputError: the bundle has no target of ONNX Runtime.
    """
    target = next((target for target in bundle.manifest.targets if target.backend == "ort"), None)
    if target is None:
        raise InputError(f"{bundle.root} has no engines of ort: compile with --target ort")
    artifact = target.engines[COMPUTE]
    file = bundle.path(artifact.path)
    products = products_model(onnx.load(file))
    onnx.save(products, folder / "products.onnx")
    return {
        "step": {"file": str(file.resolve()), "signature": artifact.signature.to_json()},
        "products": {"file": str(folder / "products.onnx"), "signature": signature_of(products).to_json()},
    }


@click.command()
@click.argument("name", type=click.Choice(list(PAIRS)))
@click.argument("work", type=click.Path(path_type=Path), default=Path("build/bench"))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads, with commas.")
@click.option("--quick", is_flag=True, help="Three pairs, to try the code.")
def main(name: str, work: Path, out: Path | None, threads: str, quick: bool) -> None:
    bundle = Bundle.open(bundle_path(work, name, "ort"))
    pairs, seconds = (QUICK_PAIRS, QUICK_SECONDS) if quick else (PAIRS[name], SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(bundle, Path(folder))
        measured = {
            number: measure_pairs(tasks, threads=int(number), pairs=pairs, seconds=seconds) for number in threads.split(",")
        }
    if out is None:
        print(json.dumps(measured, indent=1))
    else:
        write_part(out, {"case": name, "threads": measured})


if __name__ == "__main__":
    main()
