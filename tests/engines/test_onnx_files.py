"""ONNX files over one weights file: on a full disk, and behind links."""

from types import SimpleNamespace

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from full_disk import full_disk

from cachec.engines.onnx_files import OPSET, build_onnx
from cachec.runtime.errors import OutputError


def product(*sizes):
    """A model that multiplies its input by a weight [N, N] after the other."""
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([1, sizes[0]]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    weights = [np.full((size, size), 0.5, np.float32) for size in sizes]
    values = [onnx_ir.Value(name=f"w{i}", const_value=onnx_ir.tensor(w, name=f"w{i}")) for i, w in enumerate(weights)]
    nodes, last = [], x
    for value in values:
        nodes.append(onnx_ir.node("MatMul", [last, value]))
        last = nodes[-1].outputs[0]
    last.name, last.type = "y", x.type
    graph = onnx_ir.Graph([x], [last], nodes=nodes, initializers=values, name="g", opset_imports={"": OPSET})
    return onnx_ir.Model(graph, ir_version=10)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Write the files of a model as if it had been exported."""

    def built(model):
        monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model=model))
        signature = SimpleNamespace(inputs=(), outputs=())
        return build_onnx({"compute": None}, {"compute": signature}, tmp_path)["compute"]

    return built


@pytest.mark.parametrize("sizes", [(40,), (9,) * 9], ids=["weights", "graph"])
def test_a_full_disk_is_said(build, sizes):
    """Large weights go to a file of their own, small ones stay in the graph's."""
    with full_disk(), pytest.raises(OutputError, match=r"^cannot write .*: File too large\. Make room there, or choose"):
        build(product(*sizes))


def test_weights_are_found_behind_links_into_a_store(build, tmp_path):
    """As the Hugging Face Hub's client lays files out: each a link to a blob elsewhere."""
    path = build(product(40))
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([path, *tmp_path.glob("weights-*.bin")]):
        blob = file.rename(blobs / f"{number:064d}")
        (snapshot / file.name).symlink_to(blob)
    session = onnxruntime.InferenceSession(snapshot / path.name)
    (result,) = session.run(None, {"x": np.ones((1, 40), np.float32)})
    np.testing.assert_array_equal(result, np.full((1, 40), 20, np.float32))
