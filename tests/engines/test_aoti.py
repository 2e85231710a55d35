"""What is tested on AOTInductor only."""

import gc
import resource
from pathlib import Path

import torch

from cachec.compiler.graphs.build_engines import LooseSources
from cachec.compiler.graphs.export import EnginePlan
from cachec.engines.aoti import BUILDER, AotiEngine
from cachec.runtime.specs import Signature, TensorSpec

SIDE = 3000  # weights of 36 MB: above 32 MB, glibc keeps nothing that is freed (mallopt(3), M_MMAP_THRESHOLD)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_closed_engines_give_their_weights_back(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(SIDE, SIDE)

        def forward(self, x):
            return {"y": self.layer(x)}

    signature = Signature((TensorSpec("x", (1, SIDE), "float32"),), (TensorSpec("y", (1, SIDE), "float32"),))
    with torch.no_grad():
        program = torch.export.export(Layer().eval(), (), {"x": torch.zeros(1, SIDE)})
        paths = BUILDER.build(LooseSources([EnginePlan("compute", program, signature)], tmp_path), tmp_path)

    def open_and_close():
        AotiEngine.load(paths, {"compute": signature})["compute"].close()
        gc.collect()

    open_and_close()
    before = resident_bytes()
    for _ in range(4):
        open_and_close()
    assert resident_bytes() - before < 4 * SIDE**2  # of the four copies that were loaded, not one is left
