"""Torch-TensorRT cannot be imported without a GPU: that it converts every operator of our graphs is looked up in its lists."""

import json
import operator
from pathlib import Path

import pytest
import torch
from toy import example_inputs
from toy_bundle import add_predictor, split_toy

from cachec.compiler.export import plan_engines
from cachec.compiler.forecast import engine_graphs, linear_graphs
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.models import MODELS, load_model
from cachec.compiler.models.base import example_settings
from cachec.compiler.split import split_model
from cachec.passes import COMPUTE, HOISTS, Graphs, engine_passes, run_passes

LISTS = json.loads((Path(__file__).parent.parent / "data" / "torch-tensorrt-2.13-ops.json").read_text())
