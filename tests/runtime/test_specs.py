import numpy as np
import pytest

from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.specs import Signature, TensorSpec

SPEC = TensorSpec("latents", ("batch", 3), "float32")
SIGNATURE = Signature((SPEC, TensorSpec("timestep", ("batch",), "float32")), (TensorSpec("velocity", ("batch", 3), "float32"),))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_symbolic_sizes_are_resolved_by_name():
    assert SPEC.resolve({"batch": 5}) == (5, 3)


@pytest.mark.parametrize("sizes", [None, {}, {"batch": 2}, {"other": 7}])
def test_a_fitting_array_passes(sizes):
    SPEC.check(zeros(2, 3), sizes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (zeros(2, 4), r"shape \[2, 4\], expected \[2, 3\]"),
        (zeros(1, 3), r"shape \[1, 3\], expected \[2, 3\]"),
        (zeros(3), r"shape \[3\], expected"),
        (zeros(2, 3, dtype=np.float64), "dtype float64, expected float32"),
        (zeros(2, 3, dtype=np.int32), "dtype int32"),
        (np.full((2, 3), np.nan, np.float32), "NaN"),
        (np.full((2, 3), -np.inf, np.float32), "infinity"),
    ],
)
def test_an_unfit_array_is_refused_by_name(value, message):
    with pytest.raises(InputError, match=f"'latents' .*{message}"):
        SPEC.check(value, {"batch": 2})


def test_a_name_that_is_no_dtype_is_refused():
    with pytest.raises(TypeError):
        TensorSpec("x", (1,), "float31")


def test_json_round_trip():
    assert Signature.from_json(SIGNATURE.to_json()) == SIGNATURE


def test_tensors_are_found_by_name():
    assert SIGNATURE.input("latents") is SPEC
    with pytest.raises(BundleError, match="lacks the tensor 'velocity', and has latents, timestep"):
        SIGNATURE.input("velocity")
