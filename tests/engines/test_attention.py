"""Attention: masks of keys are repeated for every query in ONNX files only; TensorRT takes them back."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cachec.engines import ort
from cachec.engines.onnx_files import build_onnx
from cachec.engines.tensorrt_from_onnx import PlanFromOnnx, attentions
from cachec.engines.tensorrt_library import TENSORRT_RTX
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.specs import Signature, TensorSpec

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 6, 8


class Twice(nn.Module):
    def forward(self, x, mask):
        short, keys, values = mask[:, None, None], x.sin(), x.cos()
        first = nn.functional.scaled_dot_product_attention(x, keys, values, attn_mask=short)
        return nn.functional.scaled_dot_product_attention(first + x, first, values, attn_mask=short)


class Beside(nn.Module):
    """As where a text and a picture are attended to by the same queries."""

    def forward(self, x, y):
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, x.sin(), x.cos()) + attend(x, y, y.cos())


@pytest.fixture(scope="module")
def inputs():
    x = torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([[True, False, True, True, False, True], [True] * 4 + [False] * 2])


@pytest.fixture(scope="module")
def file(tmp_path_factory, inputs):
    program = torch.export.export(Twice(), inputs).run_decompositions({})
    x = TensorSpec("x", tuple(inputs[0].shape), "float32")
    signature = Signature((x, TensorSpec("mask", tuple(inputs[1].shape), "bool")), (TensorSpec("y", x.shape, "float32"),))
    return build_onnx({"p": program}, {"p": signature}, tmp_path_factory.mktemp("masks")).graphs["p"], signature


def test_onnx_runtime_gives_what_torch_gives(file, inputs):
    graph = onnx.load(file[0]).graph
    assert [node.op_type for node in graph.node].count("Expand") == 1, "both layers share the mask"
    ort._start_thread_pool(None)
    session = ort.open_session(file[0], [ort.CPU_PROVIDER])
    (result,) = session.run(None, {"x": inputs[0].numpy(), "mask": inputs[1].numpy()})
    np.testing.assert_allclose(result, Twice()(*inputs), atol=1e-6)


def test_tensorrt_repeats_masks_itself(file):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
    library = TENSORRT_RTX.load()
    draft = PlanFromOnnx(library, DEFAULTS, flags=TENSORRT_RTX.flags).prepare("compute", *file)
    masks = [list(attention.mask.shape) for attention in attentions(library, draft.network)]
    assert masks == [[BATCH, 1, 1, TOKENS]] * 2
    assert draft.builder.build_serialized_network(draft.network, draft.config) is not None


def test_tensorrt_builds_attention_of_the_same_queries(tmp_path, inputs):
    """TensorRT for RTX 1.7.1 crashes at it as it is written."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra rtx is not installed")
    library, x = TENSORRT_RTX.load(), inputs[0]
    program = torch.export.export(Beside(), (x, x[:, :, :4])).run_decompositions({})
    x, y = (TensorSpec(name, (BATCH, HEADS, length, WIDTH), "float32") for name, length in (("x", TOKENS), ("y", 4)))
    signature = Signature((x, y), (TensorSpec("z", x.shape, "float32"),))
    path = build_onnx({"p": program}, {"p": signature}, tmp_path).graphs["p"]
    draft = PlanFromOnnx(library, DEFAULTS, flags=TENSORRT_RTX.flags).prepare("compute", path, signature)
    assert draft.builder.build_serialized_network(draft.network, draft.config) is not None
