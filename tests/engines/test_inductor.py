"""``torch.compile``, which compiles when a graph first runs."""

import numpy as np
import torch
from engine_toys import layer

from cachec.engines.eager import ProgramBuilder
from cachec.engines.inductor import BUILDER, InductorEngine
from cachec.runtime.device import Host
from cachec.runtime.specs import Signature, TensorSpec


def test_calls_give_what_the_module_gives():
    module, plan = layer()
    engine = InductorEngine(plan.program.module(check_guards=False), plan.signature, Host())
    x, y = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32), np.empty((2, 4), np.float32)
    engine.context().run({"x": x}, {"y": y})
    with torch.no_grad():
        np.testing.assert_allclose(y, module(torch.from_numpy(x))["y"], atol=1e-6)


def test_graphs_with_sizes_beside_the_batch_are_compiled_once_for_all(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, *, dynamic: asked.append(dynamic))
    for shape in (("batch", 4), ("slots", "batch", 4)):
        InductorEngine(None, Signature((TensorSpec("x", shape, "float32"),), ()), Host())
    assert asked == [False, True]


def test_its_files_are_those_of_eager():
    assert isinstance(BUILDER, ProgramBuilder)
    assert BUILDER.engine is InductorEngine
