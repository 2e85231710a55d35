"""Released DisCa weights become parameters of our predictor for HunyuanVideo 1.0: names and shapes at full size, no values."""

import math

import numpy as np
import torch
from diffusers import HunyuanVideoTransformer3DModel

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
