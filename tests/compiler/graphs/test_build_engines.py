"""From plans to engines: in a bundle, or in a folder for a while."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from engine_toys import layer

from cachec.compiler.graphs.build_engines import LooseSources, build_targets, load_engines, planned_sources
from cachec.engines.targets import TargetName
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.engine import HOST
from cachec.runtime.write import BundleWriter


@pytest.mark.parametrize("built", [True, False])
def test_engines_to_measure_with_are_those_that_were_built_or_eagers(tmp_path, caplog, built):
    module, plan = layer()
    with BundleWriter(tmp_path / "out", force=False) as writer, ExitStack() as stack:
        (sources,) = planned_sources({"any": [plan]}, writer, "float32")
        targets = build_targets([TargetName("eager")] if built else [], sources, writer, HOST, DEFAULTS)
        assert [target.backend for target in targets] == ["eager"] * built
        assert not sources.wrote_onnx
        engine = load_engines(targets, sources, writer, stack, HOST)["compute"]
        assert ("levels are measured with PyTorch" in caplog.text) != built
        x, y = np.ones((3, 4), np.float32), np.empty((3, 4), np.float32)
        engine.context().run({"x": x}, {"y": y})
    with torch.no_grad():
        np.testing.assert_array_equal(y, module(torch.ones(3, 4))["y"])


def test_programs_are_those_of_the_plans_and_leave_no_file(tmp_path):
    plan = layer()[1]
    sources = LooseSources([plan], tmp_path)
    (program,) = sources.programs().values()
    assert program.state_dict["layer.weight"] is plan.program.state_dict["layer.weight"]
    assert sources.signatures == {"compute": plan.signature}
    assert not sources.wrote_onnx
    assert list(tmp_path.iterdir()) == []
