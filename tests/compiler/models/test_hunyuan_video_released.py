"""Released DisCa weights become parameters of our predictor for HunyuanVideo 1.0: names and shapes at full size, no values."""

import math

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.numpy import save_file
from toy_product import run_cli, succeed

from cachec.compiler.methods.disca import Disca, load_blocks
from cachec.compiler.methods.parameters import load_predictor
from cachec.compiler.models import find_model, hunyuan_video_released, load_model
from cachec.compiler.models.blocks import BlockPredictor, Body
from cachec.compiler.models.hunyuan_video import HunyuanVideoModel
from cachec.compiler.models.hunyuan_video_released import JOINED, WIDTH, released_shapes, renamed


def empty(shapes):
    """Arrays of any size that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def test_names_and_shapes_are_those_of_the_published_models_blocks():
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
        body = Body(("transformer_blocks", "single_transformer_blocks"), WIDTH, HunyuanVideoModel.GIVES)
        predictor = BlockPredictor(transformer, body)
    wanted = {name: tuple(value.shape) for name, value in predictor.state_dict().items()}
    assert {name: value.shape for name, value in renamed(empty(released_shapes())).items()} == wanted
    assert 310e6 < sum(map(math.prod, wanted.values())) < 312e6  # as the paper counts


def test_the_joined_matrix_is_cut_in_its_own_order():
    shapes = {"mm_single_blocks.1.linear1.bias": (7 * WIDTH,)}
    value = np.repeat(np.arange(7, dtype=np.float32), WIDTH)
    found = renamed(dict.fromkeys(shapes, value))
    assert [float(found[f"blocks.1.{name}.bias"].mean()) for name in JOINED] == [0, 1, 2, 4.5]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A released file of the size of the small pipeline's blocks."""
    monkeypatch.setattr(hunyuan_video_released, "WIDTH", 32)
    monkeypatch.setattr(hunyuan_video_released, "HEADS", 2)
    generator = np.random.default_rng(0)
    arrays = {name: generator.standard_normal(shape, np.float32) for name, shape in released_shapes().items()}
    save_file(arrays, tmp_path / "released.safetensors")
    return tmp_path / "released.safetensors", arrays


def test_a_released_file_becomes_a_predictor_of_its_model(small, saved_family):
    path, arrays = small
    out = path.with_name("disca.safetensors")
    assert "none stated" in succeed("import", "disca", path, "-o", out)
    model = load_model(find_model(str(saved_family("hunyuan-video"))))
    predictor = load_blocks(model, load_predictor(out))
    assert Disca().blocks(model, load_predictor(out)).fusions[0][2].bias.shape == (32,)
    x, joined = torch.randn(3, 32), arrays["mm_single_blocks.0.linear1.weight"]
    queries = predictor.blocks[0].attn.to_q(x) - predictor.blocks[0].attn.to_q.bias
    torch.testing.assert_close(queries, x @ torch.from_numpy(joined[:32]).T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("fusion_mlp.0.bias"), "fusion_mlp.0.bias is missing"),
        (lambda a: a.update(more=np.zeros(2, np.float32)), "more is surplus"),
        (lambda a: a.update({"fusion_mlp.0.bias": np.zeros(3, np.float32)}), "fusion_mlp.0.bias is [3], expected [32]"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_other_files_are_refused(small, change, message):
    path, arrays = small
    change(arrays)
    save_file(arrays, path)
    code, output = run_cli("import", "disca", path, "-o", path.with_name("out"))
    assert code != 0
    assert message in output


def test_pickled_files_are_refused(tmp_path):
    torch.save({"fusion_mlp.0.bias": torch.zeros(3)}, tmp_path / "model.pt")
    code, output = run_cli("import", "disca", tmp_path / "model.pt", "-o", tmp_path / "out")
    assert code != 0
    assert "is pickled" in output
