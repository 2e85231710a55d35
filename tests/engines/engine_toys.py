"""A graph of one layer, for back ends that take long to build; other manifests; the fake TensorRT in its place."""

import importlib.machinery
import json
import sys
from dataclasses import replace

import torch

from cachec.compiler.graphs.build_engines import LooseSources
from cachec.compiler.graphs.export import EnginePlan
from cachec.runtime.bundle import MANIFEST, Bundle
from cachec.runtime.specs import Signature, TensorSpec


class Layer(torch.nn.Module):
    def __init__(self, side, dtype=torch.float32):
        super().__init__()
        self.layer = torch.nn.Linear(side, side, dtype=dtype)

    def forward(self, x):
        y = self.layer(x)
        return {"y": torch.sin(y), "total": y.sum(1)}


def layer(side=4, dtype="float32", name="compute"):
    """The module and its plan: x [batch, side] to y [batch, side] and total [batch]."""
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    module, batch = Layer(side, kind).eval(), torch.export.Dim("batch", min=1, max=1024)
    signature = Signature(
        (TensorSpec("x", ("batch", side), dtype),),
        (TensorSpec("y", ("batch", side), dtype), TensorSpec("total", ("batch",), dtype)),
    )
    with torch.no_grad():
        program = torch.export.export(module, (), {"x": torch.zeros(2, side, dtype=kind)}, dynamic_shapes={"x": {0: batch}})
    return module, EnginePlan(name, program, signature, module)


def sources(folder, *plans):
    return LooseSources(plans or [layer()[1]], folder)


def rewrite(path, **changes):
    """Another manifest in a bundle."""
    manifest = replace(Bundle.open(path).manifest, **changes)
    (path / MANIFEST).write_text(json.dumps(manifest.to_json()))


def install(monkeypatch, fake):
    """Let ``import tensorrt`` find a fake."""
    fake.module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
