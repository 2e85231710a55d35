"""Graphs on a GPU that is pretended (``tests/pretend_gpu.py``): the answers of the CPU, and nothing left behind there."""

import numpy as np
import pytest
import torch
from pretend_gpu import PretendGpu, PretendTensor
from toy import example_inputs
from toy_bundle import IO, toy_program

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.passes.base import fetch


@pytest.fixture
def inputs():
    given = {name: value.numpy() for name, value in example_inputs().items()}
    return given["latents"], given["timestep"], {"prompt": given["prompt"]}


def test_answers_are_those_of_the_cpu(toy_split, inputs):
    x, t, conditions = inputs
    here = GraphEvaluator(toy_split, IO)
    velocity, feature = here.evaluate(x, t, conditions)
    with PretendGpu():
        there = GraphEvaluator(toy_split, IO, device="cuda:0")
        assert all(isinstance(weight, PretendTensor) for weight in there._compute.parameters())
        got = there.evaluate(x, t, conditions)
        tail = there.tail(feature, 0.25, conditions)
        final = there.play(toy_program(), x, conditions)
    np.testing.assert_array_equal(got[0], velocity)
    np.testing.assert_array_equal(got[1], feature)
    np.testing.assert_array_equal(tail, here.tail(feature, 0.25, conditions))
    np.testing.assert_array_equal(final, here.play(toy_program(), x, conditions))


def test_gradients_are_made_there(toy_split, inputs):
    x, _, conditions = inputs
    with PretendGpu():
        there = GraphEvaluator(toy_split, IO, device="cuda:0")
        latents = torch.from_numpy(x).to("cuda:0").requires_grad_()
        given = {name: torch.from_numpy(value).to("cuda:0") for name, value in conditions.items()}
        there.evaluate_with_gradients(latents, torch.tensor(0.5).to("cuda:0"), given)[0].sum().backward()
        assert isinstance(latents.grad, PretendTensor)


def test_a_weight_that_stayed_on_the_cpu_is_noticed(toy_split, inputs):
    x, t, conditions = inputs
    with PretendGpu():
        there = GraphEvaluator(toy_split, IO, device="cuda:0")
        node = next(node for node in there._compute.graph.nodes if node.op == "get_attr")
        owner, _, last = str(node.target).rpartition(".")
        held = fetch(there._compute, str(node.target))
        assert isinstance(held, PretendTensor)
        setattr(there._compute.get_submodule(owner), last, torch.nn.Parameter(held.detach().cpu(), requires_grad=False))
        with pytest.raises(RuntimeError, match="found at least two, cuda:0 and cpu"):
            there.evaluate(x, t, conditions)
