"""An estimate of the toy, and a GPU that is made up."""

from dataclasses import replace

import pytest
from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs.prepare import engine, linear
from cachec.compiler.planning.estimate import estimate
from cachec.compiler.planning.gpus import GpuFigures


@pytest.fixture
def gpu():
    return GpuFigures("H100", 1e6, 1e9, "nowhere")


@pytest.fixture(scope="session")
def found(toy_split):
    plain = linear(toy_split)
    return estimate(plain, engine(plain, ToyModel.io), ToyModel.spec, replace(SETTINGS, steps=8), budget=2, batch=3)
