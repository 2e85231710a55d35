import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cachec.engines.ort import open_session
from cachec.runtime.errors import InputError

products = pytest.importorskip("bench.products", reason="the source tree is not beside the tests")

TOKENS, WIDTH, HEADS = 6, 8, 2


def value(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def step_model(*nodes):
    """x [B, L, D] → two products with weights, attention over the result, and things that are no products."""
    rng = np.random.default_rng(0)
    weights = {"w": (WIDTH, 3 * WIDTH), "g": (WIDTH, WIDTH), "bias": (WIDTH,)}
    tensors = [numpy_helper.from_array(rng.random(shape, np.float32), name) for name, shape in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1, WIDTH]), "flat"))
    graph = helper.make_graph(list(nodes), "step", [value("x", ["B", TOKENS, WIDTH])], [value("y", None)], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


NODES = (
    helper.make_node("Gelu", ["x"], ["a"]),
    helper.make_node("MatMul", ["a", "w"], ["qkv"]),
    helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=2, num_outputs=3),
    helper.make_node("Attention", ["q", "k", "v"], ["mixed"], q_num_heads=HEADS, kv_num_heads=HEADS),
    helper.make_node("Reshape", ["mixed", "flat"], ["rows"]),
    helper.make_node("Gemm", ["rows", "g", "bias"], ["y"], transB=1),
)


@pytest.fixture(scope="module")
def made():
    return products.products_model(step_model(*NODES))


def test_nothing_but_the_products_is_left_and_weights_stay_constants(made):
    assert [node.op_type for node in made.graph.node] == ["MatMul", "MatMul", "MatMul", "Gemm"]
    assert {tensor.name for tensor in made.graph.initializer} == {"w", "g", "bias"}
    assert [spec.shape for spec in products.signature_of(made).inputs] == [
        (1, TOKENS, WIDTH),
        (1, HEADS, TOKENS, WIDTH // HEADS),
        (1, HEADS, WIDTH // HEADS, TOKENS),
        (1, HEADS, TOKENS, TOKENS),
        (1, HEADS, TOKENS, WIDTH // HEADS),
        (TOKENS, WIDTH),
    ]
    assert [spec.shape for spec in products.signature_of(made).outputs] == [
        (1, TOKENS, 3 * WIDTH),
        (1, HEADS, TOKENS, TOKENS),
        (1, HEADS, TOKENS, WIDTH // HEADS),
        (TOKENS, WIDTH),
    ]


def test_the_products_run_and_are_those_of_the_step(made, tmp_path):
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, tmp_path / "products.onnx")
    session = open_session(tmp_path / "products.onnx", ["CPUExecutionProvider"])
    given = {one.name: np.random.default_rng(1).random(one.shape, np.float32) for one in session.get_inputs()}
    first, *_, last = session.run(None, given)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    np.testing.assert_allclose(first, given["factor_0"] @ weights["w"], rtol=1e-5)
    np.testing.assert_allclose(last, given["factor_5"] @ weights["g"].T + weights["bias"], rtol=1e-5)


def test_a_process_of_its_own_times_a_file(made, tmp_path):
    onnx.save(made, tmp_path / "products.onnx")
    signature = products.signature_of(made).to_json()
    task = {"file": str(tmp_path / "products.onnx"), "signature": signature, "threads": 1, "seconds": 0.01}
    assert 0 < products.time_in_child(task) < 1000


def test_a_step_without_products_is_refused():
    with pytest.raises(InputError, match="none of Gemm, MatMul, Attention"):
        products.products_model(step_model(helper.make_node("Gelu", ["x"], ["y"])))


def test_a_share_is_of_neighbours(monkeypatch):
    """The machine gets slower; pairs do not notice."""
    clock = iter([10.0, 8.0, 16.0, 20.0, 40.0, 32.0])  # the second pair begins with the products
    asked = []
    monkeypatch.setattr(products, "time_in_child", lambda task: asked.append(task["file"]) or next(clock))
    tasks = {"step": {"file": "s"}, "products": {"file": "p"}}
    found = products.measure_pairs(tasks, threads=1, pairs=3, seconds=0.1)
    assert asked == ["s", "p", "p", "s", "s", "p"]
    assert found["share"] == {"median": 0.8, "low": 0.8, "high": 0.8}
    assert found["step_ms"]["median"] == 20.0
