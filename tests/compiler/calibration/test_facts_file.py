import numpy as np
import pytest

from cachec.compiler.calibration.facts_file import FactsFile
from cachec.runtime.errors import PredictorError

KIND = FactsFile("predictor", "predictor-7", "cachec train", PredictorError)
ARRAYS = {"rows": np.arange(6.0).reshape(2, 3).T, "told": np.ones(2, np.float32)}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(KIND.content(ARRAYS, {"steps": "4"}))
    return path


def test_a_file_holds_all_of_it(written):
    arrays, facts = KIND.read(written)
    assert facts == {"steps": "4", "format": "predictor-7"}
    assert set(arrays) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_truncated_file_is_refused(written, keep):
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(PredictorError, match="is not a predictor file, or is damaged .*: make one with cachec train"):
        KIND.read(written)


@pytest.mark.parametrize("content", [b"hello", b"{}", bytes(4096)], ids=["text", "json", "zeros"])
def test_a_file_of_something_else_is_refused(written, content):
    written.write_bytes(content)
    with pytest.raises(PredictorError, match="is not a predictor file, or is damaged"):
        KIND.read(written)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_missing_file_says_how_to_make_one(tmp_path, place):
    with pytest.raises(PredictorError, match="does not exist: make one with cachec train"):
        KIND.read(tmp_path / place)


def test_another_format_is_refused(written):
    with pytest.raises(PredictorError, match=r"is not a predictor file of this cachec \(predictor-8\)"):
        FactsFile("predictor", "predictor-8", "cachec train", PredictorError).read(written)


def test_all_reasons_are_given_and_only_those():
    facts = {"steps": "4", "weights": "a" * 64, "model": "tiny"}
    KIND.check(facts, {"steps": "4"}, "b")
    with pytest.raises(
        PredictorError,
        match="b .made for tiny. is of something else: weights is a{12}…, wanted x; seed is unknown, wanted 1. ",
    ):
        KIND.check(facts, {"steps": "4", "weights": "x", "seed": "1"}, "b")
