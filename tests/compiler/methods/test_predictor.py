"""Probing a predictor, against the passes that fold it."""

import numpy as np
import pytest
import torch
from toy_lesa import random_lesa, sigmas_of

from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.predictor import probe_rows
from cachec.compiler.methods.taylor import Taylor
from cachec.passes import DropAsserts, FoldStatic, Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import FEATURE, FORECAST, VELOCITY


def folded_rows(method, predictor, histories, num_steps):
    """Rows and bias as the passes find them: the predictor captured and folded."""
    graph = capture_predictor(predictor, method.window, torch.randn(2, 3, 4), num_steps)
    result = next(iter(reversed(graph.graph.nodes)))
    result.args = ({VELOCITY: outputs(graph)[FEATURE], FEATURE: outputs(graph)[FEATURE]},)
    graph.recompile()
    graphs = DropAsserts().run(Graphs({FORECAST: graph})).graphs
    rows = FoldStatic(torch.from_numpy(sigmas_of(num_steps)), histories).run(graphs).graphs.rows
    return rows.coefficients.numpy(), rows.bias.numpy()


@pytest.mark.parametrize(
    ("method", "predictor"), [(Taylor(3), Taylor(3).predictor(None)), (Lesa(), random_lesa(20))], ids=["taylor", "lesa"]
)
def test_probed_rows_are_the_folded_ones(method, predictor):
    histories = method.histories(method.interval(20, 5))
    for got, expected in zip(
        probe_rows(predictor, histories, sigmas_of(20)), folded_rows(method, predictor, histories, 20), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
