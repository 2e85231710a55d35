import numpy as np
import pytest
from numpy_engines import SIGNATURES, make_engines

from cachec.runtime.abi import ADVANCE
from cachec.runtime.device import Host
from cachec.runtime.engine import check_bindings
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.specs import Signature, TensorSpec

SPEC = TensorSpec("latents", ("batch", 3), "float32")
SIGNATURE = Signature((SPEC, TensorSpec("timestep", ("batch",), "float32")), (TensorSpec("velocity", ("batch", 3), "float32"),))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def bind(inputs=None, outputs=None):
    inputs = {"latents": zeros(2, 3), "timestep": zeros(2), **(inputs or {})}
    check_bindings(SIGNATURE, Host(), inputs, {"velocity": zeros(2, 3)} if outputs is None else outputs)


def test_fitting_bindings_pass_and_outputs_may_be_left_out():
    bind()
    bind(outputs={})


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"prompt": zeros(2)}, None, "engine inputs are"),
        ({}, {"feature": zeros(2, 3)}, "no tensor 'feature'; it has"),
        ({"timestep": zeros(3)}, None, "'timestep' has shape"),
        ({"timestep": zeros(3)}, {}, "'timestep' has shape"),
        ({"timestep": zeros(2, dtype=np.float64)}, None, r"'timestep' is float64\[2\], expected float32"),
        ({}, {"velocity": zeros(1, 3)}, "'velocity' has shape"),
        ({"latents": np.asfortranarray(zeros(2, 3))}, None, "'latents' is not contiguous"),
        ({"latents": [[0.0]]}, None, "'latents' is a list, which is no buffer of cpu"),
    ],
)
def test_unfit_bindings_are_refused(inputs, outputs, message):
    with pytest.raises(InputError, match=message):
        bind(inputs, outputs)


def test_a_context_runs_on_the_given_buffers_and_a_closed_engine_makes_none():
    engine = make_engines()[ADVANCE]
    inputs = {spec.name: np.ones(spec.resolve({"batch": 1, "slots": 2}), np.float32) for spec in SIGNATURES[ADVANCE].inputs}
    out = np.zeros((1, 3, 4), np.float32)
    with engine:
        context = engine.context()
        assert context.scratch_bytes({}) == 0
        context.run(inputs, {"next_latents": out})
    assert (out == 3).all()
    with pytest.raises(BundleError, match="the engine was closed: load the bundle again"):
        engine.context()
