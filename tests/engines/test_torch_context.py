"""Calls of what PyTorch runs."""

import numpy as np
import pytest
import torch

from cachec.engines.torch_context import TorchContext
from cachec.runtime.device import Host
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.specs import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", (2,), "float32"),), tuple(TensorSpec(name, (2,), "float32") for name in "yz"))


def context(function):
    return TorchContext(function, SIGNATURE, Host())


def test_results_are_copied_into_what_is_bound_only():
    x, z = np.ones(2, np.float32), np.zeros(2, np.float32)
    call = context(lambda inputs: {"y": inputs["x"], "z": 3 * inputs["x"]}).bind({"x": x}, {"z": z})
    assert not z.any()
    call.run()
    np.testing.assert_array_equal(z, [3, 3])
    x[:] = 2
    call.run()  # bound to the memory
    np.testing.assert_array_equal(z, [6, 6])


def test_no_gradients_are_kept():
    weight = torch.ones(2, requires_grad=True)
    seen = []

    def function(inputs):
        seen.append(weight * inputs["x"])
        return {"y": seen[0]}

    context(function).run({"x": np.ones(2, np.float32)}, {"y": np.zeros(2, np.float32)})
    assert not seen[0].requires_grad


def test_lack_of_memory_and_wrong_buffers_are_said():
    with pytest.raises(EngineError, match="there is no memory for a call"):
        context(lambda inputs: {"y": torch.zeros(1 << 24, 1 << 24)}).run(
            {"x": np.ones(2, np.float32)}, {"y": np.zeros(2, np.float32)}
        )
    with pytest.raises(InputError, match="engine has no tensor 'w'"):
        context(dict).bind({"x": np.ones(2, np.float32)}, {"w": np.zeros(2, np.float32)})
