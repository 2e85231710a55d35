"""FLOPs of graphs against products done by hand."""

import pytest
import torch
from torch import nn
from toy import TOKENS, WIDTH, ToyDiT, example_inputs

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.costs import run_costs
from cachec.compiler.graphs.flops import node_flops, run_flops
from cachec.runtime.abi import MODEL

aten = torch.ops.aten


class Layers(nn.Module):
    """One of each operator that is counted: a linear layer, attention with fewer keys, two products, a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 10, bias=False), nn.Conv1d(3, 5, kernel_size=2)

    def forward(self, x, y):
        wide = self.linear(x)  # [B, 3, 10]
        seen = nn.functional.scaled_dot_product_attention(wide[:, None], y[:, None], y[:, None])  # over 7 keys
        product = torch.matmul(seen[:, 0], y.transpose(1, 2))  # [B, 3, 7]
        return self.conv(torch.bmm(product, product.transpose(1, 2))) + torch.sin(product).sum()  # [B, 3, 3] -> [B, 5, 2]


def test_each_operator_counts_two_for_every_product_of_one_sample():
    graph = capture_model(Layers(), {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 7, 10)}).modules[MODEL]
    counts = [count for node in graph.graph.nodes if node.op == "call_function" and (count := node_flops(node))]
    assert counts == [2 * 3 * 4 * 10, 4 * 3 * 7 * 10, 2 * 3 * 10 * 7, 2 * 3 * 7 * 3, 2 * (5 * 2) * (3 * 2)]


@pytest.mark.parametrize("head_axis", [True, False])
def test_the_toy_counts_as_by_hand(head_axis):
    graph = capture_model(ToyDiT(head_axis=head_axis), example_inputs()).modules[MODEL]
    block = 2 * WIDTH * 2 * WIDTH + TOKENS * 2 * WIDTH * (3 + 2 + 2) * WIDTH + 4 * TOKENS * TOKENS * WIDTH
    ends = 2 * WIDTH + 2 * (TOKENS * 2 * WIDTH * WIDTH) + 2 * WIDTH * 2 * WIDTH  # time, embed and out, the tail's modulation
    assert run_flops(graph) == run_costs(graph)[1] == 3 * block + ends
