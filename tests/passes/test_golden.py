import os
from pathlib import Path

import pytest
import torch
from toy_bundle import IO, split_toy

from cachec.compiler.graphs.prepare import engine, linear
from cachec.passes import graph_text
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "CACHEC_UPDATE_GOLDEN"


def split_text(split, name):
    return graph_text(split.modules[name])


def linear_text(split):
    return graph_text(linear(split).modules[FORECAST])


def engine_text(split, name):
    return graph_text(engine(linear(split), IO).modules[name])


def cast_text():
    return graph_text(split_toy(dtype=torch.bfloat16).modules[COMPUTE])


TEXTS = {
    "compute": lambda split: split_text(split, COMPUTE),
    "forecast": lambda split: split_text(split, FORECAST),
    "forecast-linear": linear_text,
    "engine-prologue": lambda split: engine_text(split, PROLOGUE),
    "engine-compute": lambda split: engine_text(split, COMPUTE),
    "engine-forecast": lambda split: engine_text(split, FORECAST),
    "compute-bfloat16": lambda split: cast_text(),
}


@pytest.mark.parametrize("name", TEXTS)
def test_graphs_of_the_toy_are_as_they_were(toy_split, name):
    path = GOLDEN / f"{name}.txt"
    text = TEXTS[name](toy_split)
    if os.environ.get(UPDATE) == "1":
        path.write_text(text)
    assert text == path.read_text(), f"if the change is wanted: {UPDATE}=1 pytest {Path(__file__).name}, and read the diff"


def test_every_golden_file_is_compared():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(TEXTS)
