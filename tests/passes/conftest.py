"""Graphs of the toy that several files look at."""

import pytest
from toy import ToyDiT, example_inputs

from cachec.compiler.graphs.capture import capture_model
from cachec.compiler.graphs.prepare import linear


@pytest.fixture(scope="session")
def toy():
    return ToyDiT().eval()


@pytest.fixture(scope="session")
def model(toy):
    return capture_model(toy, example_inputs())


@pytest.fixture(scope="session")
def linear_graphs(toy_split):
    return linear(toy_split)
