import pytest

from cachec.runtime.errors import BundleError
from cachec.runtime.model_io import ModelIO


def test_a_manifest_keeps_what_engines_are_called_with():
    io = ModelIO("latents", "timestep", ("prompt", "reference"), parts=("reference",), axis=1, output=(0, 64))
    read = ModelIO.from_json(io.to_json())
    assert read == ModelIO("latents", "timestep", ("prompt", "reference"))  # the rest is in the graphs by then


@pytest.mark.parametrize(
    "data", [{}, {"latents": "x", "timestep": "t"}, {"latents": "", "timestep": "", "conditions": 3}, None]
)
def test_a_damaged_manifest_is_refused(data):
    with pytest.raises(BundleError, match="does not say which input plays which part: io is"):
        ModelIO.from_json(data)
