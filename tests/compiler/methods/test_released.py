"""Reading what others released: safely, by name and shape."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from cachec.compiler.methods.released import check_names, is_non_commercial, load_given, read_tensors
from cachec.runtime.errors import PredictorError


def test_tensors_are_read_in_float32_whatever_they_are_stored_in(tmp_path):
    save_torch(
        {"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "n": torch.tensor([3])}, tmp_path / "b", {"license": "mit"}
    )
    arrays, facts = read_tensors(tmp_path / "b")
    assert arrays["a"].tolist() == [1.5, -2.0]
    assert (arrays["a"].dtype, arrays["n"].dtype) == (np.float32, np.int64)
    assert facts["license"] == "mit"


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_files_are_refused_with_the_line_that_converts_them(tmp_path, how):
    path = tmp_path / "weights.pt"
    if how == "torch":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(
        PredictorError, match=r"weights.pt is pickled, which can run any code .* convert it first, with python -c"
    ):
        read_tensors(path)


def test_the_line_that_converts_does(tmp_path):
    import subprocess
    import sys

    from cachec.compiler.methods.released import CONVERT

    torch.save({"a": torch.ones(2, 3).T, "note": 7}, tmp_path / "w.pt")
    code = CONVERT.split('"')[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pt")], check=True)
    arrays, _ = read_tensors(tmp_path / "w.pt.safetensors")
    assert arrays["a"].shape == (3, 2)


def test_what_is_damaged_or_not_finite_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is no file of tensors")
    save_file({"a": np.array([1.0, np.nan], np.float32)}, tmp_path / "nan")
    for name, message in (("text", "is not a safetensors file"), ("nan", "a holds NaN"), ("gone", "does not exist")):
        with pytest.raises(PredictorError, match=message):
            read_tensors(tmp_path / name)


def test_names_and_shapes_are_checked_and_all_that_is_wrong_is_said(tmp_path):
    found = {"a": np.ones(2), "b": np.ones(3)}
    with pytest.raises(PredictorError, match=r"w does not fit: c is missing; b is surplus; a is \[2\], expected \[4\]"):
        check_names(tmp_path / "w", found, {"a": (4,), "c": (1,)})
    check_names(tmp_path / "w", found, {"a": (2,), "b": (3,)})


def test_licences_are_told_by_their_usual_names():
    assert is_non_commercial("FLUX.1-dev Non-Commercial License")
    assert is_non_commercial("CC BY-NC 4.0")
    assert not is_non_commercial("Apache-2.0")


FACTS = {"format": "cachec-predictor-1", "method": "l2p", "steps": "50"}


def test_a_given_file_is_of_the_method_and_the_steps(tmp_path):
    save_file({"a": np.ones(1)}, tmp_path / "p", {**FACTS, "imported_from": "them"})
    assert load_given(tmp_path / "p", "l2p", 50).origin == str(tmp_path / "p")
    with pytest.raises(PredictorError, match="method is l2p, wanted lesa"):
        load_given(tmp_path / "p", "lesa", 50)
    with pytest.raises(PredictorError, match="steps is 50, wanted 28"):
        load_given(tmp_path / "p", "l2p", 28)


def test_a_given_file_that_is_pickled_or_as_its_authors_released_it_is_refused_with_what_to_do(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "p.pt")
    with pytest.raises(PredictorError, match=r"p.pt is pickled.*convert it first, with python -c"):
        load_given(tmp_path / "p.pt", "dyweight", 50)
    save_file({"phi": np.ones(3)}, tmp_path / "raw")
    with pytest.raises(PredictorError, match="raw is not a predictor file.*cachec train, or cachec import of released weights"):
        load_given(tmp_path / "raw", "dyweight", 50)
