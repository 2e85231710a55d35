"""ONNX files over one weights file: their form, on a full disk, and behind links."""

import hashlib
import logging
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from engine_toys import layer
from full_disk import full_disk

from cachec.engines import onnx_files, ort
from cachec.engines.onnx_files import OPSET, build_onnx
from cachec.engines.weights_file import ALIGNMENT
from cachec.runtime.errors import OutputError
from cachec.runtime.specs import Signature, TensorSpec

SIDE = 32  # weights of 4096 bytes: they go into the shared file, the bias does not


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
        monkeypatch.setattr(onnx_files, "converted", lambda *_: model)
        signature = SimpleNamespace(inputs=(), outputs=())
        return build_onnx({"compute": None}, {"compute": signature}, tmp_path).graphs["compute"]

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
    ort._start_thread_pool(None)
    session = ort.open_session(snapshot / path.name, [ort.CPU_PROVIDER])
    (result,) = session.run(None, {"x": np.ones((1, 40), np.float32)})
    np.testing.assert_array_equal(result, np.full((1, 40), 20, np.float32))


class Twice(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, x]), torch.cat([x, x])


def test_outputs_that_are_the_same_value_keep_their_names(tmp_path):
    """Two blocks may hand over one mask: it is made once, and found under both names."""
    program = torch.export.export(Twice(), (torch.ones(2),))
    specs = [TensorSpec(name, (size,), "float32") for name, size in (("x", 2), ("first", 4), ("second", 4))]
    file = build_onnx({"p": program}, {"p": Signature(tuple(specs[:1]), tuple(specs[1:]))}, tmp_path).graphs["p"]
    assert [value.name for value in onnx.load(file).graph.output] == ["first", "second"]
    ort._start_thread_pool(None)
    session = ort.open_session(file, [ort.CPU_PROVIDER])
    for result in session.run(["first", "second"], {"x": np.ones(2, np.float32)}):
        np.testing.assert_array_equal(result, np.ones(4, np.float32))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two graphs over the same weights; and the module."""
    out, (module, plan) = tmp_path_factory.mktemp("onnx"), layer(SIDE)
    names = ("compute", "forecast")
    return module, build_onnx(dict.fromkeys(names, plan.program), dict.fromkeys(names, plan.signature), out).graphs, out


def test_files_have_our_names_and_opset_and_no_paths_of_this_machine(files):
    _, paths, out = files
    assert paths == {name: out / f"{name}.onnx" for name in ("compute", "forecast")}
    for path in paths.values():
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
        assert [value.name for value in model.graph.input] == ["x"]
        assert [value.name for value in model.graph.output] == ["y", "total"]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert b".py" not in path.read_bytes()


def test_weights_are_stored_once_and_aligned_and_named_by_their_hash(files):
    module, paths, out = files
    (weights,) = out.glob("weights-*.bin")
    content = weights.read_bytes()
    assert weights.name == f"weights-{hashlib.sha256(content).hexdigest()[:16]}.bin"
    assert len(content) == 4 * SIDE * SIDE
    for path in paths.values():
        model = onnx.load(path, load_external_data=False)
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        (place,) = [{entry.key: entry.value for entry in tensor.external_data} for tensor in outside]
        assert place["location"] == weights.name
        assert int(place["offset"]) % ALIGNMENT == 0
    stored = np.frombuffer(content, np.float32).reshape(SIDE, SIDE)
    wanted = module.layer.weight.detach().numpy()
    assert any(np.array_equal(one, wanted) for one in (stored, stored.T))


def test_a_graph_that_is_written_again_has_the_same_bytes(files):
    compute, forecast = (path.read_bytes() for path in files[1].values())  # each is exported by itself
    assert compute == forecast


def test_what_libraries_may_say_is_as_before(build):
    loggers = {name: logging.getLogger(name) for name in ("onnx_ir", "onnxscript")}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        loggers["onnx_ir"].setLevel(logging.CRITICAL)
        loggers["onnxscript"].setLevel(logging.DEBUG)
        with onnx_files.only_errors(*loggers):
            assert [logger.level for logger in loggers.values()] == [logging.CRITICAL, logging.ERROR]
        with full_disk(), pytest.raises(OutputError):
            build(product(40))
        assert [logger.level for logger in loggers.values()] == [logging.CRITICAL, logging.DEBUG]
    finally:
        for name, level in before.items():
            loggers[name].setLevel(level)


def test_without_the_exporter_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"writing ONNX files needs 'onnx_ir', .*pip install 'cachec\[compile\]'"):
        build_onnx({}, {}, tmp_path)


def test_sizes_stay_in_the_graph_however_many_they_are(build):
    """ONNX Runtime reads them while it loads a graph: "Cannot parse data from external tensors", says it of others."""
    parts = 150
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([1, parts]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    sizes = onnx_ir.Value(name="sizes", const_value=onnx_ir.tensor(np.ones(parts, np.int64), name="sizes"))
    cut = onnx_ir.node("Split", [x, sizes], {"axis": 1}, num_outputs=parts)
    joined = onnx_ir.node("Concat", cut.outputs[::-1], {"axis": 1})
    last = joined.outputs[0]
    last.name, last.type = "y", x.type
    for number, value in enumerate(cut.outputs):
        value.name = f"part{number}"
    graph = onnx_ir.Graph([x], [last], nodes=[cut, joined], initializers=[sizes], name="g", opset_imports={"": OPSET})
    path = build(onnx_ir.Model(graph, ir_version=10))
    ort._start_thread_pool(None)
    (result,) = ort.open_session(path, [ort.CPU_PROVIDER]).run(None, {"x": np.arange(parts, dtype=np.float32)[None]})
    np.testing.assert_array_equal(result[0], np.arange(parts)[::-1])
