"""Exported programs as files; bfloat16, which numpy has not, lies in tensors."""

import numpy as np
import pytest
import torch
from engine_toys import layer, sources

from cachec.engines import get_builder
from cachec.engines.eager import EagerEngine
from cachec.runtime.errors import BundleError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calls_give_what_the_module_gives(tmp_path, dtype):
    module, plan = layer(dtype=dtype)
    files = get_builder("eager").build(sources(tmp_path, plan), tmp_path)
    with EagerEngine.load(files, {"compute": plan.signature})["compute"] as engine:
        device = engine.device
        x, y = (device.empty((3, 4), dtype) for _ in range(2))
        device.upload(np.arange(12, dtype=np.float32).reshape(3, 4) / 8, x)
        engine.context().run({"x": x}, {"y": y})
        with torch.no_grad():
            wanted = module(torch.arange(12).reshape(3, 4).to(getattr(torch, dtype)) / 8)["y"]
        np.testing.assert_array_equal(device.download(y), wanted.float())
        assert isinstance(y, torch.Tensor if dtype == "bfloat16" else np.ndarray)


def test_other_builders_still_have_their_examples(tmp_path):
    _, plan = layer()
    get_builder("eager").build(sources(tmp_path, plan), tmp_path)
    assert plan.program.example_inputs is not None
    assert torch.export.load(tmp_path / "compute.pt2").example_inputs is None


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "compute.pt2").write_bytes(b"nothing of that kind")
    with pytest.raises(BundleError, match="cannot load .*compute.pt2"):
        EagerEngine.load({"compute": tmp_path / "compute.pt2"}, {"compute": layer()[1].signature})
