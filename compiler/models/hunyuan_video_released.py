"""DisCa's predictor as its authors released it for HunyuanVideo 1.0 (Hub ``tencent/DisCa``, ``predictor_540p``), in our names.

Read Tencent-Hunyuan/DisCa, ``disca_t2v_hyvideo10/hyvideo/disca_utils/predictor.py``: one fusion for image and text, two
single-stream blocks in Tencent's layout, where queries, keys, values and the hidden layer are one matrix. Diffusers, whose
blocks ours are, has them apart; both multiply what attention and hidden layer give by one matrix, in this order.
"""

from collections.abc import Mapping

import numpy as np

from cachec.runtime.specs import Array

WIDTH, HEADS, RATIO, NUM_BLOCKS = 3072, 24, 4, 2  # channels, heads, hidden channels over channels, blocks
FUSION, BLOCKS = "fusion_mlp", "mm_single_blocks"
SAME = {  # of a block: theirs, and ours
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "modulation.linear": "norm.linear",
}
JOINED = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")  # what linear1 is made of


def released_shapes() -> dict[str, tuple[int, ...]]:
    """What the released file holds, by name."""
    hidden = RATIO * WIDTH
    linear = {
        "linear1": (3 * WIDTH + hidden, WIDTH),
        "linear2": (WIDTH, WIDTH + hidden),
        "modulation.linear": (3 * WIDTH, WIDTH),
    }
    shapes = _of_linear(f"{FUSION}.0", (WIDTH, 2 * WIDTH)) | _of_linear(f"{FUSION}.2", (WIDTH, WIDTH))
    for block in range(NUM_BLOCKS):
        place = f"{BLOCKS}.{block}"
        shapes |= {f"{place}.{name}.weight": (WIDTH // HEADS,) for name in ("q_norm", "k_norm")}
        for name, shape in linear.items():
            shapes |= _of_linear(f"{place}.{name}", shape)
    return shapes


def _of_linear(name: str, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def renamed(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The released tensors, which are all there, as parameters of ``BlockPredictor``."""
    found: dict[str, Array] = {}
    for name, value in arrays.items():
        path, _, last = name.rpartition(".")
        if path.startswith(FUSION):
            found[f"fusions.0.{path.removeprefix(f'{FUSION}.')}.{last}"] = value
            continue
        _, block, layer = path.split(".", 2)
        if layer == "linear1":
            parts = np.split(value, [WIDTH, 2 * WIDTH, 3 * WIDTH])
            found |= {f"blocks.{block}.{ours}.{last}": part for ours, part in zip(JOINED, parts, strict=True)}
        else:
            found[f"blocks.{block}.{SAME[layer]}.{last}"] = value
    return found
