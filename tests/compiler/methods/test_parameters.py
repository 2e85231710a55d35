import numpy as np
import pytest

from cachec.compiler.methods import parameters as module
from cachec.compiler.methods.parameters import Parameters, check_fit, find_pretrained, load_predictor, predictor_bytes
from cachec.runtime.errors import PredictorError

KNOWN = Parameters({"rows": np.arange(6.0).reshape(2, 3), "told": np.ones(2, np.float32)}, {"method": "m", "steps": "4"}, "now")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "m-1.safetensors"
    path.write_bytes(predictor_bytes(KNOWN))
    return path


def test_a_file_holds_all_of_it(written):
    read = load_predictor(written)
    assert {name: (value.dtype, value.tobytes()) for name, value in read.arrays.items()} == {
        name: (value.dtype, value.tobytes()) for name, value in KNOWN.arrays.items()
    }
    assert read.facts == {**KNOWN.facts, "format": module.FORMAT}
    assert read.origin == str(written)


def test_what_is_no_predictor_file_is_refused(written, tmp_path):
    with pytest.raises(PredictorError, match="does not exist: make one with cachec train"):
        load_predictor(tmp_path / "nowhere")
    written.write_bytes(written.read_bytes()[:-3])
    with pytest.raises(PredictorError, match="is not a safetensors file, or is damaged"):
        load_predictor(written)
    written.write_bytes(module.save({}, {"format": "cachec-calibration-2"}))
    with pytest.raises(PredictorError, match="is not a predictor file of this cachec"):
        load_predictor(written)


def test_a_predictor_of_something_else_is_refused_with_all_reasons():
    check_fit(KNOWN, {"steps": "4"})
    with pytest.raises(
        PredictorError, match="now was trained for something else: steps is 4, wanted 5; seed is unknown, wanted 1"
    ):
        check_fit(KNOWN, {"method": "m", "steps": "5", "seed": "1"})


def test_a_shipped_predictor_is_found_by_method_and_facts(written, monkeypatch):
    monkeypatch.setattr(module, "PRETRAINED", written.parent)
    assert find_pretrained("m", {"steps": "4"}).origin == str(written)
    assert find_pretrained("m", {"steps": "5"}) is None
    assert find_pretrained("other", {"steps": "4"}) is None
