import numpy as np
import pytest

from cachec.compiler.methods import parameters as module
from cachec.compiler.methods.parameters import Parameters, check_fit, find_pretrained, load_predictor, predictor_bytes
from cachec.runtime.errors import PredictorError

KNOWN = Parameters({"rows": np.arange(6.0).reshape(2, 3)}, {"method": "m", "steps": "4", "weights_sha256": "aa"}, "now")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "m-1.safetensors"
    path.write_bytes(predictor_bytes(KNOWN))
    return path


def test_a_file_holds_all_of_it(written):
    read = load_predictor(written)
    np.testing.assert_array_equal(read.arrays["rows"], KNOWN.arrays["rows"])
    assert read.facts == {**KNOWN.facts, "format": module.FILE.format}
    assert read.origin == str(written)


def test_a_predictor_of_something_else_is_refused():
    check_fit(KNOWN, {"steps": "4"})
    with pytest.raises(PredictorError, match="predictor now is of something else: steps is 4, wanted 5"):
        check_fit(KNOWN, {"method": "m", "steps": "5"})


def test_a_shipped_predictor_is_found_by_method_and_facts(written, monkeypatch):
    monkeypatch.setattr(module, "PRETRAINED", written.parent)
    assert find_pretrained("m", {"steps": "4"}, lambda: "aa").origin == f"ships with cachec ({written.name})"
    assert find_pretrained("m", {"steps": "4"}, lambda: "ab") is None
    assert find_pretrained("other", {"steps": "4"}, lambda: "aa") is None


def test_weights_are_hashed_only_if_all_else_fits(written, monkeypatch):
    monkeypatch.setattr(module, "PRETRAINED", written.parent)
    assert find_pretrained("m", {"steps": "5"}, lambda: pytest.fail("it takes long")) is None
